"""The tables of a study's report, as text with a sense: better or worse than what it is compared with.

Shapes: S seeds, D domains, and a last column for the mean over domains.
"""

from collections.abc import Iterable

import numpy as np

from trainer.config.study import OURS, SINGLE_DOMAIN
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
)
from trainer.reporting.html import Cell, Table
from trainer.run_files import HEADLINE
from trainer.study.baselines import POPULARITY, SYSTEMS
from trainer.study.results import (
    METRICS,
    RANKINGS,
    PairedDifference,
    SystemResults,
    paired_difference,
)
from trainer.study.runner import Study, SweepResult

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


def _domain_names(study: Study) -> list[str]:
    return [domain.name for domain in study.dataset.domains]


def _metric_table(
    study: Study,
    ranking: str,
    metric: str,
) -> Table:
    """The paper's Table 2: a line a system, a column a domain, and their mean."""
    seeds = len(study.config.seeds)
    values = _metric_by_system(
        study,
        ranking,
        metric,
    )
    means = {name: values_SD.mean(0) for name, values_SD in values.items()}
    best_D = np.zeros(0)
    if means:
        best_D = np.nanmax(np.stack(list(means.values())), axis=0)
    rows = []
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
        text=f"Test users ranked among {RANKED[ranking]}; mean{over_seeds}",
        columns=["system", *map(escape_name, _domain_names(study)), "mean"],
        rows=rows,
    )


def _metric_by_system(
    study: Study,
    ranking: str,
    metric: str,
) -> dict[str, np.ndarray]:
    """Of every system, popularity first: (S, D + 1), the mean over domains last."""
    names = _domain_names(study)
    values = {}
    if study.popularity:
        popularity = study.popularity[ranking]
        metrics = [popularity.by_domain[name][metric] for name in names]
        metrics.append(popularity.mean[metric])
        values[POPULARITY] = np.array([metrics], np.float64)  # NaN for None
    for name, results in study.results.items():
        values_SD = results.by_domain(
            ranking,
            metric,
            len(names),
        )
        mean_S1 = np.nanmean(
            values_SD,
            axis=1,
            keepdims=True,
        )
        values[name] = np.concatenate([values_SD, mean_S1], axis=1)
    return values


def _gains_over_single_domain(
    study: Study,
    ranking: str,
) -> Table | None:
    """The paper's Table 4: gain or loss against the single-domain model."""
    if SINGLE_DOMAIN not in study.results:
        return None
    names = _domain_names(study)
    single = study.results[SINGLE_DOMAIN]
    single_D = single.by_domain(
        ranking,
        HEADLINE,
        len(names),
    ).mean(0)
    rows = []
    for name, results in study.results.items():
        if name == SINGLE_DOMAIN:
            continue
        system_D = results.by_domain(
            ranking,
            HEADLINE,
            len(names),
        ).mean(0)
        single_mean = np.nanmean(single_D)
        system_mean = np.nanmean(system_D)
        gains = list((system_D - single_D) / single_D)
        gains.append((system_mean - single_mean) / single_mean)
        row = [Cell(escape_name(name))]
        for gain in gains:
            text = format_signed(gain, "+.1%")
            row.append(Cell(text, _sense(gain)))
        rows.append(row)
    return Table(
        title=f"Against {SINGLE_DOMAIN}, {RANKED[ranking]}",
        text=f"{HEADLINE} against {SINGLE_DOMAIN}, a model of each domain alone: what the "
        "other domains add or take away.",
        columns=["system", *map(escape_name, names), "mean"],
        rows=rows,
    )


def _differences_from_ours(
    study: Study,
    ranking: str,
) -> Table | None:
    """The paper's Table 5 and a paired test: every baseline and ablation less SyNCRec."""
    if OURS not in study.results:
        return None
    ours = study.results[OURS]
    domains = {}
    for domain, name in enumerate(_domain_names(study)):
        if (ours.domain_U == domain).any():
            domains[domain] = escape_name(name)
    rows = []
    for name, results in study.results.items():
        if name == OURS:
            continue
        row = [Cell(escape_name(name))]
        for domain in domains:
            difference = paired_difference(
                results,
                ours,
                ranking,
                domain=domain,
            )
            row.append(_difference_cell(difference))
        mean = paired_difference(
            results,
            ours,
            ranking,
        )
        low = format_signed(mean.low, "+.4f")
        high = format_signed(mean.high, "+.4f")
        row += [
            _difference_cell(mean),
            Cell(f"{low} to {high}"),
            Cell(_format_p(mean.p)),
        ]
        rows.append(row)
    return Table(
        title=f"Against {OURS}, {RANKED[ranking]}",
        text=f"{HEADLINE} of each system less {OURS}'s over the same users, means of "
        "seeds; coloured where the 95 % interval of a paired bootstrap over users leaves "
        "0 out. Systems without a part of SyNCRec are the ablations.",
        columns=["system", *domains.values(), "mean", "95 %", "p"],
        rows=rows,
    )


def _format_p(p: float) -> str:
    """The bootstrap's least p is 0.002."""
    if p <= 0.002:
        return "≤ 0.002"
    return f"{p:.3f}"


def _difference_cell(difference: PairedDifference) -> Cell:
    """Coloured where the confidence interval leaves 0 out."""
    sense = ""
    if difference.is_significant:
        sense = _sense(difference.value)
    return Cell(format_signed(difference.value, "+.4f"), sense)


def _sweep_table(
    study: Study,
    key: str,
    points: list[SweepResult],
) -> Table:
    """A line for each value of a setting."""
    domains = len(study.dataset.domains)
    columns = [key, "validation"]
    columns += [f"test, {RANKED[ranking]}" for ranking in RANKINGS]
    rows = []
    for point in points:
        cells = [
            escape_name(str(point.value)),
            format_number(point.results.validation[0]),
        ]
        for ranking in RANKINGS:
            test_D = point.results.by_domain(
                ranking,
                HEADLINE,
                domains,
            ).mean(0)
            mean = float(np.nanmean(test_D))
            cells.append(format_number(mean))
        rows.append(_row(cells))
    return Table(
        title=f"{OURS} by {key}",
        text=f"Mean {HEADLINE} over domains, first seed.",
        columns=columns,
        rows=rows,
    )


def _cost_table(study: Study) -> Table:
    """Time, epochs and speed of each system."""
    rows = []
    for name, results in study.results.items():
        cells = [
            escape_name(name),
            format_duration(float(np.mean(results.seconds))),
            f"{np.mean(results.epochs):.1f}",
            f"{np.nanmean(results.users_per_second):,.0f}",
            format_number(np.mean(results.validation)),
        ]
        rows.append(_row(cells))
    return Table(
        title="What it cost",
        text="Of one seed's training with its validations, "
        f"{study.config.parallel} runs side by side; {SINGLE_DOMAIN} is the sum of its "
        "models, its epochs and speed their mean.",
        columns=[
            "system",
            "time",
            "epochs",
            "users/s",
            f"validation {HEADLINE}",
        ],
        rows=rows,
    )


def _tuning_table(study: Study) -> Table | None:
    """Every combination of hyperparameters that was tried."""
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
        text="Settings over the base.",
        columns=["system", "", "settings"],
        rows=rows,
    )


def _row(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


def mean_metric(
    results: SystemResults,
    ranking: str,
    metric: str = HEADLINE,
) -> float:
    """The mean over domains and seeds."""
    domains = 1 + int(results.domain_U.max())
    mean_D = results.by_domain(
        ranking,
        metric,
        domains,
    ).mean(0)
    return float(np.nanmean(mean_D))


def _sense(value: float) -> str:
    """The colour of a difference."""
    if value > 0:
        return "better"
    return "worse" if value < 0 else ""


def format_signed(
    value: float,
    form: str,
) -> str:
    """A number with its sign, as people write it; a dash for NaN."""
    if np.isnan(value):
        return "–"
    text = format(value, form)
    return text.replace("-", "\N{MINUS SIGN}").replace("%", " %")
