"""The tables of a study's report, as text with a sense: what is better than what it is compared with, and what is worse."""

import numpy as np

from trainer.reporting.html import Cell, Table
from trainer.reporting.run_log import HEADLINE, duration, number, printable
from trainer.study.baselines import ALONE, OURS, POPULARITY, SYSTEMS
from trainer.study.results import METRICS, RANKINGS, Found, compared

RANKED = {"sampled": "99 negatives of the domain", "full": "all items of the domain"}


def tables(study) -> list[Table]:
    """All that there is something to say for."""
    found = []
    for ranking in RANKINGS:
        found += [
            _overall(study, ranking, HEADLINE),
            _beside(study, ranking),
            _against(study, ranking),
        ]
    found += [_sweep(study, key, values) for key, values in study.sweeps.items()]
    found += [
        _overall(study, ranking, metric)
        for ranking in RANKINGS
        for metric in METRICS
        if metric != HEADLINE
    ]
    found += [_cost(study), _tuning(study), _about(study)]
    return [table for table in found if table is not None and table.rows]


def _names(study):
    return [domain.name for domain in study.dataset.domains]


def _overall(study, ranking, metric):
    """The paper's Table 2: a line a system, a column a domain, and their mean."""
    names, seeds = _names(study), len(study.config.seeds)
    values, rows = {}, []
    for name, found in study.found.items():
        by_seed = found.by_domain(ranking, metric, len(names))
        values[name] = np.concatenate(
            [by_seed, np.nanmean(by_seed, axis=1, keepdims=True)], axis=1
        )
    if study.popularity:
        by_domain, mean = study.popularity[ranking]
        every = [*(by_domain[name][metric] for name in names), mean[metric]]
        values = {
            POPULARITY: np.array(
                [[np.nan if value is None else value for value in every]]
            )
        } | values
    means = {name: of.mean(0) for name, of in values.items()}
    best = np.nanmax(np.stack(list(means.values())), axis=0) if means else []
    for name, of in values.items():
        row = [Cell(printable(name))]
        for place, value in enumerate(means[name]):
            text = number(None if np.isnan(value) else value)
            if len(of) > 1:
                text += f" ± {of[:, place].std(ddof=1):.4f}"
            row.append(Cell(text, "best" if value == best[place] else ""))
        rows.append(row)
    text = f"Test users ranked among {RANKED[ranking]}; mean"
    text += (
        f" and standard deviation over {seeds} seeds." if seeds > 1 else " of one seed."
    )
    return Table(
        f"{metric} by domain, {RANKED[ranking]}",
        text,
        ["system", *map(printable, names), "mean"],
        rows,
    )


def _beside(study, ranking):
    """The paper's Table 4: gain or loss against the single-domain model."""
    if ALONE not in study.found:
        return None
    names, rows = _names(study), []
    alone = study.found[ALONE].by_domain(ranking, HEADLINE, len(names)).mean(0)
    for name, found in study.found.items():
        if name == ALONE:
            continue
        own = found.by_domain(ranking, HEADLINE, len(names)).mean(0)
        shares = [
            *((own - alone) / alone),
            (np.nanmean(own) - np.nanmean(alone)) / np.nanmean(alone),
        ]
        rows.append(
            [
                Cell(printable(name)),
                *(Cell(signed(share, "+.1%"), _sense(share)) for share in shares),
            ]
        )
    text = f"{HEADLINE} against {ALONE}, a model of each domain alone: what the other domains add or take away."
    return Table(
        f"Against {ALONE}, {RANKED[ranking]}",
        text,
        ["system", *map(printable, names), "mean"],
        rows,
    )


def _against(study, ranking):
    """The paper's Table 5 and a paired test: every system less SyNCRec."""
    if OURS not in study.found:
        return None
    names, rows, ours = _names(study), [], study.found[OURS]
    for name, found in study.found.items():
        if name == OURS:
            continue
        whole = compared(found, ours, ranking)
        by_domain = [
            compared(found, ours, ranking, domain=d)
            for d in range(len(names))
            if (ours.domain_U == d).any()
        ]
        row = [Cell(printable(name))]
        row += [
            Cell(
                signed(one.value, "+.4f"),
                _sense(one.value) if one.low * one.high > 0 else "",
            )
            for one in by_domain
        ]
        row.append(
            Cell(
                signed(whole.value, "+.4f"),
                _sense(whole.value) if whole.low * whole.high > 0 else "",
            )
        )
        row.append(Cell(f"{signed(whole.low, '+.4f')} to {signed(whole.high, '+.4f')}"))
        row.append(Cell(f"{whole.p:.3f}" if whole.p > 0.002 else "≤ 0.002"))
        rows.append(row)
    text = (
        f"{HEADLINE} of each system less {OURS}'s over the same users, means of seeds; coloured where the 95 % interval of a "
        "paired bootstrap over users leaves 0 out. Systems without a part of SyNCRec are the ablations."
    )
    columns = [
        "system",
        *(
            printable(name)
            for d, name in enumerate(names)
            if (ours.domain_U == d).any()
        ),
    ]
    return Table(
        f"Against {OURS}, {RANKED[ranking]}",
        text,
        [*columns, "mean", "95 %", "p"],
        rows,
    )


def _sweep(study, key, values):
    names, rows = _names(study), []
    for value, found in values:
        test = [
            found.by_domain(ranking, HEADLINE, len(names)).mean(0)
            for ranking in RANKINGS
        ]
        cells = [
            number(found.validation[0]),
            *(number(float(np.nanmean(of))) for of in test),
        ]
        rows.append([Cell(printable(str(value))), *map(Cell, cells)])
    columns = [key, "validation", *(f"test, {RANKED[ranking]}" for ranking in RANKINGS)]
    return Table(
        f"{OURS} by {key}", f"Mean {HEADLINE} over domains, first seed.", columns, rows
    )


def _cost(study):
    rows = []
    for name, found in study.found.items():
        times = duration(float(np.mean(found.seconds)))
        speed = f"{np.nanmean(found.users_per_second):,.0f}"
        cells = [
            times,
            f"{np.mean(found.epochs):.1f}",
            speed,
            number(np.mean(found.validation)),
        ]
        rows.append([Cell(printable(name)), *map(Cell, cells)])
    text = (
        f"Of one seed's training with its validations, {study.config.parallel} runs side by side; {ALONE} is the sum of its "
        "models, its epochs and speed their mean."
    )
    columns = ["system", "time", "epochs", "users/s", f"validation {HEADLINE}"]
    return Table("What it cost", text, columns, rows)


def _tuning(study):
    if not study.config.tune:
        return None
    rows = []
    for name, tried in study.tried.items():
        for domain, variant, validation in tried:
            chosen = study.chosen[name].get(domain) == variant
            label = f"{name}, {domain}" if domain else name
            rows.append(
                [
                    Cell(printable(label)),
                    Cell(" ".join(variant)),
                    Cell(number(validation), "best" if chosen else ""),
                ]
            )
    text = f"Every system was tried with the same settings on the first seed; the best by validation {HEADLINE} stands for it."
    return Table(
        "How systems were tuned",
        text,
        ["system", "settings", f"validation {HEADLINE}"],
        rows,
    )


def _about(study):
    rows = []
    for name in study.found:
        if name in SYSTEMS:
            of, own = SYSTEMS[name], study.config.own.get(name, [])
            rows.append(
                [
                    Cell(printable(name)),
                    Cell(of.about),
                    Cell(" ".join([*of.settings, *own]) or "–"),
                ]
            )
        else:
            rows.append(
                [
                    Cell(printable(name)),
                    Cell("RecBole's"),
                    Cell(str(study.config.recbole[name] or "its defaults")),
                ]
            )
    return Table(
        "What the systems are",
        "Settings over the base.",
        ["system", "", "settings"],
        rows,
    )


def mean(found: Found, ranking, metric=HEADLINE) -> float:
    """The mean over domains and seeds."""
    return float(
        np.nanmean(
            found.by_domain(ranking, metric, 1 + int(found.domain_U.max())).mean(0)
        )
    )


def _sense(value):
    return "better" if value > 0 else "worse" if value < 0 else ""


def signed(value, form):
    """A number with its sign, as people write it; a dash where there is none."""
    return (
        "–"
        if np.isnan(value)
        else format(value, form).replace("-", "\N{MINUS SIGN}").replace("%", " %")
    )
