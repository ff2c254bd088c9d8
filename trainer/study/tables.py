"""The tables of a study's report, as text with a sense: better or worse than what it is compared with.

Shapes: S seeds, D domains, and a last column for the mean over domains.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainer.config.study import OURS, SINGLE_DOMAIN
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
    format_signed,
    mean_sentence,
)
from trainer.reporting.html import Cell, Table
from trainer.run_files import HEADLINE
from trainer.study.baselines import SYSTEMS, has_recency, name_with_recency
from trainer.study.results import (
    METRICS,
    RANKINGS,
    PairedDifference,
    SystemResults,
    paired_difference,
)
from trainer.study.runner import Study, SweepResult

OVER_USERS = "over users"
_COLOURED = (
    "Coloured where the 95 % interval leaves 0 out; what is not may be chance."
)
RANKED = {
    "sampled": "99 negatives of the domain",
    "full": "all items of the domain",
}


def make_tables(study: Study) -> list[Table]:
    """All tables that have rows."""
    tables: list[Table | None] = []
    for ranking in RANKINGS:
        tables += [
            _metric_table(study, ranking, HEADLINE),
            _gains_over_single_domain(study, ranking),
            _differences_from_ours(study, ranking),
        ]
    for key, points in study.sweeps.items():
        tables.append(_sweep_table(study, key, points))
    for ranking in RANKINGS:
        for metric in METRICS:
            if metric != HEADLINE:
                tables.append(_metric_table(study, ranking, metric))
    tables += [_cost_table(study), _tuning_table(study), _systems_table(study)]
    return [table for table in tables if table is not None and table.rows]


def _domain_columns(study: Study) -> list[str]:
    """The heads of a table by domain: the domains, and both means."""
    names = [escape_name(name) for name in study.domain_names]
    return ["system", *names, "mean", OVER_USERS]


def _users_row(study: Study) -> list[Cell]:
    """The first row of a table by domain: how many test users each column is of."""
    users_D = study.users
    counts = [*users_D, users_D[study.counted].sum(), users_D.sum()]
    return [Cell("test users"), *(Cell(f"{count:,}") for count in counts)]


def sentence_on_domains(study: Study) -> str:
    """Which domains the mean leaves out, as a sentence; empty where none."""
    users = dict(zip(study.domain_names, study.users.tolist(), strict=True))
    counted = [study.domain_names[number] for number in study.counted]
    sentence = mean_sentence(users, counted, study.min_users)
    if sentence is None:
        return ""
    return f" {sentence[0].upper()}{sentence[1:]}."


def _metric_table(
    study: Study,
    ranking: str,
    metric: str,
) -> Table:
    """The paper's Table 2: a line a system, a column a domain, and both means.

        system       Beauty   Food     mean     over users
        test users   1,204    2,310    3,514    3,514
        popularity   0.0910   0.1032   0.0971   0.0990
        recency …    0.1810   0.1532   0.1671   0.1690
        SDSR         0.3610   0.3290   0.3450   0.3400
        SyNCRec      0.3571   0.3321   0.3446   0.3407

    With several seeds a figure is followed by " ± " and the standard deviation over them.
    """
    seeds = len(study.config.seeds)
    values = _metric_by_system(
        study,
        ranking,
        metric,
    )
    means = {name: values_SD.mean(0) for name, values_SD in values.items()}
    best_D = np.zeros(0)
    rows = []
    if means:
        rows.append(_users_row(study))
        best_D = _column_maxima(np.stack(list(means.values())))
    for name, values_SD in values.items():
        row = [Cell(escape_name(name))]
        for column, value in enumerate(means[name]):
            text = format_number(None if np.isnan(value) else value)
            if len(values_SD) > 1:
                deviation = values_SD[:, column].std(ddof=1)
                text += f" ± {deviation:.4f}"
            sense = "best" if value == best_D[column] else ""
            row.append(Cell(text, sense))
        rows.append(row)
    over_seeds = " of one seed."
    if seeds > 1:
        over_seeds = f" and standard deviation over {seeds} seeds."
    return Table(
        title=f"{metric} by domain, {RANKED[ranking]}",
        text=f"Test users ranked among {RANKED[ranking]}; mean{over_seeds} The largest of a "
        f"column is bold, whether or not that is chance.{sentence_on_domains(study)}",
        columns=_domain_columns(study),
        rows=rows,
    )


def _column_maxima(values: np.ndarray) -> np.ndarray:
    """The largest of each column, NaN where a column has none."""
    filled = np.where(np.isnan(values), -np.inf, values)
    largest = filled.max(axis=0)
    return np.where(np.isinf(largest), np.nan, largest)


def _metric_by_system(
    study: Study,
    ranking: str,
    metric: str,
) -> dict[str, np.ndarray]:
    """Of every system, untrained baselines first: (S, D + 2), both means last."""
    names = study.domain_names
    values = {}
    for baseline, by_ranking in study.baselines.items():
        if study.results:
            by_domain = by_ranking[ranking].by_domain
            values[baseline] = _baseline_values(study, by_domain, metric)
    for name, results in study.results.items():
        values_SD = results.by_domain(
            ranking,
            metric,
            len(names),
        )
        mean_S = values_SD[:, study.counted].mean(axis=1)
        over_users_S = results.over_users(ranking, metric)
        columns = [values_SD, mean_S[:, None], over_users_S[:, None]]
        values[name] = np.concatenate(columns, axis=1)
    return values


def _baseline_values(
    study: Study, by_domain: dict[str, dict[str, Any]], metric: str
) -> np.ndarray:
    """An untrained baseline's line: (1, D + 2), both means last."""
    metrics = [by_domain[name][metric] for name in study.domain_names]
    value_D = np.array(metrics, np.float64)  # NaN for None
    users_D = study.users
    known_D = np.flatnonzero(users_D)
    mean = value_D[study.counted].mean()
    over_users = np.average(value_D[known_D], weights=users_D[known_D])
    return np.array([[*value_D, mean, over_users]])


def _differences(
    study: Study, one: SystemResults, other: SystemResults, ranking: str
) -> list[PairedDifference | None]:
    """`one` less `other` in the columns of `_domain_columns`; None without users."""
    differences: list[PairedDifference | None] = []
    for domain, users in enumerate(study.users):
        difference = None
        if users:
            difference = paired_difference(one, other, ranking, domain=domain)
        differences.append(difference)
    mean = paired_difference(one, other, ranking, domains=study.counted)
    everyone = paired_difference(one, other, ranking, over_users=True)
    return [*differences, mean, everyone]


def _gains_over_single_domain(
    study: Study,
    ranking: str,
) -> Table | None:
    """The paper's Table 4: gain or loss against the single-domain model.

        system    Beauty             Food               mean               over users
        CDSR      −3.0% (p 0.004)    −4.0% (p ≤ 0.002)  −3.5% (p ≤ 0.002)  −3.6% (p ≤ 0.002)
        SyNCRec   −1.1% (p 0.390)    +0.9% (p 0.510)    −0.1% (p 0.942)    +0.2% (p 0.810)

    With the recency term a system is compared with SDSR that has it too. A cell is coloured where its 95 % interval leaves 0 out. None without SDSR in the study.
    """
    if SINGLE_DOMAIN not in study.results:
        return None
    values = _metric_by_system(study, ranking, HEADLINE)
    rows = [_users_row(study)]
    for name, results in study.results.items():
        single_name = SINGLE_DOMAIN
        with_recency = name_with_recency(SINGLE_DOMAIN)
        if has_recency(name) and with_recency in study.results:
            single_name = with_recency
        if name == single_name:
            continue
        single = study.results[single_name]
        single_C = values[single_name].mean(0)
        row = [Cell(escape_name(name))]
        differences = _differences(study, results, single, ranking)
        for difference, before in zip(differences, single_C, strict=True):
            row.append(_relative_cell(difference, before))
        rows.append(row)
    return Table(
        title=f"Against {SINGLE_DOMAIN}, {RANKED[ranking]}",
        text=f"{HEADLINE} of each system against {SINGLE_DOMAIN}, a model of each domain alone: "
        "what the other domains add (above 0) or take away, and p of a paired bootstrap over "
        f"users. {_COLOURED}{sentence_on_domains(study)}",
        columns=_domain_columns(study),
        rows=rows if len(rows) > 1 else [],
    )


def _differences_from_ours(
    study: Study,
    ranking: str,
) -> Table | None:
    """The paper's Table 5 and a paired test: SyNCRec less every baseline and ablation.

        system       Beauty              Food                mean                mean, 95 %
        SDSR         −0.0039 (p 0.390)   +0.0031 (p 0.510)   −0.0004 (p 0.942)   −0.0080 to +0.0071
        w/o LC-NTG   +0.0012 (p 0.610)   −0.0020 (p 0.480)   −0.0004 (p 0.870)   −0.0051 to +0.0043

    Above 0 SyNCRec is better, as in the table against SDSR. None without SyNCRec in the study.
    """
    if OURS not in study.results:
        return None
    ours = study.results[study.ours]
    rows = [[*_users_row(study), Cell("")]]
    for name, results in study.results.items():
        if name == study.ours:
            continue
        row = [Cell(escape_name(name))]
        differences = _differences(study, ours, results, ranking)
        row += [_difference_cell(difference) for difference in differences]
        row.append(_interval_cell(differences[len(study.domain_names)]))
        rows.append(row)
    return Table(
        title=f"{study.ours} against each other system, {RANKED[ranking]}",
        text=f"{HEADLINE} of {study.ours} less the system's over the same users (above 0: it is "
        "better), means of seeds, and p of a paired bootstrap over users. "
        f"{_COLOURED} Systems without a part of SyNCRec are the ablations."
        f"{sentence_on_domains(study)}",
        columns=[*_domain_columns(study), "mean, 95 %"],
        rows=rows if len(rows) > 1 else [],
    )


def format_p(p: float) -> str:
    """The bootstrap's least p is 0.002."""
    if p <= 0.002:
        return "≤ 0.002"
    return f"{p:.3f}"


def _difference_cell(difference: PairedDifference | None) -> Cell:
    """Coloured where the confidence interval leaves 0 out."""
    if difference is None:
        return Cell("–")
    return _signed_cell(difference, format_signed(difference.value, "+.4f"))


def _interval_cell(difference: PairedDifference | None) -> Cell:
    """The 95 % confidence interval: −0.0080 to +0.0071."""
    if difference is None:
        return Cell("–")
    low = format_signed(difference.low, "+.4f")
    high = format_signed(difference.high, "+.4f")
    return Cell(f"{low} to {high}")


def _relative_cell(difference: PairedDifference | None, before: float) -> Cell:
    """The difference as a share of what it is compared with."""
    if difference is None or not before:
        return Cell("–")
    return _signed_cell(
        difference, format_signed(difference.value / before, "+.1%")
    )


def _signed_cell(difference: PairedDifference, text: str) -> Cell:
    """The figure with its p, in the colour of its sign where that is no chance.

    "+6.1 % (p 0.062)"; without p where there are too few users to say.
    """
    if not difference.is_known:
        return Cell(f"{text} (few users)")
    sense = ""
    if difference.is_significant:
        sense = _sense(difference.value)
    return Cell(f"{text} (p {format_p(difference.p)})", sense)


def _sweep_table(
    study: Study,
    key: str,
    points: list[SweepResult],
) -> Table:
    """A line for each value of a setting.

    model.experts   validation   test, 99 negatives   test, all items   test users
    2               0.3501       0.3440               0.0651            3,514
    4               0.3570       0.3502               0.0662            3,514
    """
    columns = [key, "validation"]
    columns += [f"test, {RANKED[ranking]}" for ranking in RANKINGS]
    rows = []
    for point in points:
        cells = [
            escape_name(str(point.value)),
            format_number(point.results.validation[0]),
        ]
        for ranking in RANKINGS:
            mean = mean_metric(study, point.results, ranking)
            cells.append(format_number(mean))
        cells.append(f"{len(point.results.user_U):,}")
        rows.append(_row(cells))
    columns.append("test users")
    return Table(
        title=f"{OURS} by {key}",
        text=f"Mean {HEADLINE} over the domains that count, first seed."
        f"{sentence_on_domains(study)}",
        columns=columns,
        rows=rows,
    )


def _cost_table(study: Study) -> Table:
    """Time, epochs and speed of each system.

    system    time      epochs   best epoch was the last   users/s   validation NDCG@10
    SDSR      0:21:10   8.5      0                         310       0.3531
    SyNCRec   0:46:02   11.0     1                         148       0.3600
    """
    rows = []
    for name, results in study.results.items():
        if has_recency(name):
            continue
        cells = [
            escape_name(name),
            format_duration(float(np.mean(results.seconds))),
            f"{np.mean(results.epochs):.1f}",
            f"{len(study.unconverged.get(name, []))}",
            f"{np.nanmean(results.users_per_second):,.0f}",
            format_number(float(np.mean(results.validation))),
        ]
        rows.append(_row(cells))
    return Table(
        title="What it cost",
        text="Of one seed's training with its validations, "
        f"{study.config.parallel} runs side by side; {SINGLE_DOMAIN} is the sum of its "
        "models, its epochs and speed their mean. Where a run's best epoch was its last, more "
        "epochs might have been better.",
        columns=[
            "system",
            "time",
            "epochs",
            "best epoch was the last",
            "users/s",
            f"validation {HEADLINE}",
        ],
        rows=rows,
    )


def _tuning_table(study: Study) -> Table | None:
    """Every combination of hyperparameters that was tried.

    system          settings                    validation NDCG@10
    SDSR, Beauty    table.learning_rate=0.02    0.3510
    SDSR, Beauty    table.learning_rate=0.05    0.3557, bold: it was chosen
    SyNCRec         table.learning_rate=0.02    0.3600, bold
    """
    if not study.config.tune:
        return None
    rows = []
    for name, trials in study.trials.items():
        for trial in trials:
            label = name
            if trial.domain:
                label = f"{name}, {trial.domain}"
            best = study.best_settings[name].get(trial.domain) == trial.settings
            row = [
                Cell(escape_name(label)),
                Cell(" ".join(trial.settings)),
                Cell(format_number(trial.validation), "best" if best else ""),
            ]
            rows.append(row)
    return Table(
        title="How systems were tuned",
        text="Every system was tried with the same settings on the first seed; the best "
        f"by validation {HEADLINE} stands for it.",
        columns=["system", "settings", f"validation {HEADLINE}"],
        rows=rows,
    )


def _systems_table(study: Study) -> Table:
    """What each ablation and baseline changes in the base."""
    rows = []
    for name in study.results:
        if has_recency(name):
            continue
        if name in SYSTEMS:
            system = SYSTEMS[name]
            settings = [*system.settings, *study.config.own.get(name, [])]
            cells = [escape_name(name), system.about, " ".join(settings) or "–"]
        else:
            options = study.config.recbole[name] or "its defaults"
            cells = [escape_name(name), "RecBole's", str(options)]
        rows.append(_row(cells))
    return Table(
        title="What the systems are",
        text=f"Settings over the base.{_about_recency(study)}",
        columns=["system", "", "settings"],
        rows=rows,
    )


def _about_recency(study: Study) -> str:
    """What the rows with the recency term are, where there are any."""
    if not any(has_recency(name) for name in study.results):
        return ""
    return (
        " A name with + recency is the same trained model, with a term of the counts of the recent "
        "past added to its scores, fitted by validation."
    )


def _row(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


def mean_metric(
    study: Study,
    results: SystemResults,
    ranking: str,
    metric: str = HEADLINE,
) -> float:
    """The mean over the domains that count, and over seeds."""
    domains = len(study.domain_names)
    mean_D = results.by_domain(ranking, metric, domains).mean(0)
    counted = results.counted_domains(domains, study.min_users)
    return float(mean_D[counted].mean())


def _sense(value: float) -> str:
    """The colour of a difference."""
    if value > 0:
        return "better"
    return "worse" if value < 0 else ""
