"""`report.html`: a run on one page, from its `metrics.jsonl` and `config.yaml`, readable with no network.

Plotly's JavaScript stands in the page, whose content security policy forbids every request. All words from outside (domain
names, the config) are escaped: by Jinja2 in the page, by `plots.styles` in the plots, as Plotly reads some HTML in labels.
"""

import json
from pathlib import Path

import numpy as np

from trainer.errors import InputError
from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.html import rendered, template
from trainer.reporting.run_log import (
    HEADLINE,
    LOOK,
    METRICS_FILE,
    duration,
    metrics_of,
    number,
    printable,
    read_records,
    skipped_sentence,
    skipped_users,
    times,
)
from trainer.run_files import FULL

LAST_SHARE = 0.2  # of the train lines: what "at the end" means


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html` from what the run has logged so far and returns its path.

    A run without evaluations, without λ or with a torn last line gives a page that says so in place of those parts.
    Raises InputError when the folder has no metrics.jsonl.
    """
    folder = Path(folder)
    if not (folder / METRICS_FILE).is_file():
        raise InputError(
            f"{folder / METRICS_FILE}: not found; name the folder of a run that has started to train"
        )
    records = read_records(folder / METRICS_FILE)
    train, validations, tests = (
        [r for r in records if r["kind"] == kind]
        for kind in ("train", "validation", "test")
    )
    best = max(validations, key=_rank, default=None)
    test = tests[-1] if tests else None
    domains = plots.styles(_domain_names(records))
    skipped = skipped_users(records)
    look = _read_json(folder / LOOK) or {}
    config = folder / "config.yaml"
    page = template(Path(__file__).with_name("report.html.jinja")).render(
        name=folder.resolve().name,
        cards=_cards(records, train, best, test),
        skipped=skipped_sentence(skipped) if skipped else None,
        findings=_findings(train, [domain.name for domain in domains]),
        last_share=f"{LAST_SHARE:.0%}",
        final=_table(test or best, domains) if test or best else None,
        full=[
            _full_table(record)
            for record in map(_read_json, sorted(folder.glob(f"{FULL}-*.json")))
            if record
        ],
        sections=_sections(train, validations, best, test or best, look, domains),
        nearest=_nearest(look.get("items") or []),
        thinning=_thinning(len(train)),
        config=config.read_text(encoding="utf-8", errors="replace")
        if config.is_file()
        else None,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _sections(train, validations, best, final, look, domains):
    """The plots in order, each with a title, a sentence and its HTML, or None where there is nothing to plot."""
    sections = [
        (
            "Loss and its parts",
            "The loss that is minimised, its single-domain and cross-domain parts, and the mutual-information loss.",
            plots.loss_plot(train),
        ),
        (
            "λ by domain",
            "The weight of each domain in the cross-domain loss; a small λ holds back a domain that the others harm.",
            plots.weight_plot(train, domains),
        ),
        (
            "φ by domain: the negative transfer gap",
            "Single-domain minus cross-domain loss over the same targets; below 0 the other domains harm the prediction.",
            plots.gap_plot(train, domains),
        ),
        (
            "Single-domain and cross-domain loss by domain",
            "Grey: predicted from the domain's own history. Coloured: predicted from the history over all domains.",
            plots.pairs_plot(train, domains),
        ),
        (
            f"Validation {HEADLINE} by domain",
            f"{'The black line is the mean; the' if len(domains) > 1 else 'The'} dotted upright marks the best step.",
            plots.validation_plot(validations, best, domains),
        ),
        (
            "All metrics by domain",
            "The figures of the table above.",
            plots.metrics_plot(final, domains),
        ),
        *_look_sections(look, domains),
        (
            "Speed",
            "Users trained per second over all ranks, the share of the time spent waiting for data, and memory in use.",
            plots.panels_plot(train, plots.SPEED),
        ),
        (
            "Optimisation",
            "The learning rate, the norm of the gradient before clipping, and the scales α and β of the λ update.",
            plots.panels_plot(train, plots.OPTIMISATION),
        ),
    ]
    return rendered(sections)


def _look_sections(look, domains):
    """Plots of what the best model is like, where it has been looked at and has such parts."""
    sections = [
        (
            "Gates: which experts a domain uses",
            "The mean weight of each expert in the best model: of the cross-domain gate by the domain of a token's item, and "
            "of each domain's own gate.",
            plots.gates_plot(look.get("gates") or {}),
        ),
        (
            "λ in the end",
            "Of the best model. The line is what equal weights would be.",
            plots.final_weights_plot(look.get("lambda") or {}, domains),
        ),
    ]
    return [section for section in sections if section[2] is not None]


def _thinning(lines):
    text = "Bold lines are moving means over the faint lines of the logged figures"
    size = -(-lines // plots.MAX_POINTS)
    text += (
        f", each point of which is the mean of {size} log lines." if size > 1 else "."
    )
    return text + " Drag to zoom, double-click to go back, click a name to hide it."


def _rank(record):
    value = record["mean"].get(HEADLINE)
    return -1.0 if value is None else value


def _domain_names(records):
    names = {}
    for record in records:
        for field in (
            "single_by_domain",
            "cross_by_domain",
            "lambda",
            "phi",
            "domains",
        ):
            names |= dict.fromkeys(record.get(field) or {})
    return list(names)


def _seconds(records):
    """Seconds over all records; a clock that goes back was started anew by a resume."""
    total = before = 0.0
    for now in (
        record["seconds"] for record in records if record.get("seconds") is not None
    ):
        total += now - before if now >= before else now
        before = now
    return total


def _median(train, field):
    values = plots.series(train, field)
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def _cards(records, train, best, test):
    """The headline figures: (title, figure, note) each."""
    test_card, best_card = ("–", "no test yet"), ("–", "no validation yet")
    if test:
        figure = test["mean"].get(HEADLINE)
        ratio = times(figure, (test.get("popularity_mean") or {}).get(HEADLINE))
        test_card = (
            number(figure),
            "mean" if ratio == "–" else f"mean, {ratio} popularity",
        )
    if best:
        best_card = (
            number(best["mean"].get(HEADLINE)),
            f"mean, at step {best['step']:,}",
        )
    speed, wait = _median(train, "users_per_second"), _median(train, "data_wait")
    steps = max((record["step"] for record in records), default=0)
    return [
        ("Test " + HEADLINE, *test_card),
        ("Best validation " + HEADLINE, *best_card),
        ("Duration", duration(_seconds(records)), f"{steps:,} steps"),
        (
            "Users per second",
            "–" if speed is None else f"{speed:,.0f}",
            "median" if wait is None else f"median, {wait:.1%} waiting for data",
        ),
    ]


def _findings(train, names):
    """Sentences on how the run ended; domains' figures are means over the last LAST_SHARE of the train lines."""
    last = train[-max(1, round(len(train) * LAST_SHARE)) :]
    gaps, weights = _means(last, "phi", names), _means(last, "lambda", names)
    found = []
    if gaps:
        negative = [
            f"{printable(name)} (φ {_signed(gap)})"
            for name, gap in gaps.items()
            if gap < 0
        ]
        count = f"{len(negative)} of {len(gaps)} domain{'s' if len(gaps) > 1 else ''}"
        if negative:
            found.append(
                f"{count} ended with negative transfer: {', '.join(negative)}."
            )
        else:
            found.append(
                "No domain ended with negative transfer: no mean φ is below 0."
            )
        absent = [printable(name) for name in names if name not in gaps]
        if absent:
            found.append(f"No φ was logged at the end for {', '.join(absent)}.")
    if len(weights) > 1:
        name = min(weights, key=weights.get)
        equal = sum(weights.values()) / len(weights)
        found.append(
            f"Smallest λ: {printable(name)} with {weights[name]:.3f}; equal weights would be {equal:.3f}."
        )
    lost = [record["step"] for record in train if record.get("loss") is None]
    if lost:
        count = f"{len(lost):,} of {len(train):,} train lines"
        found.append(
            f"The loss was not a finite number in {count}, first at step {lost[0]:,}."
        )
    return found


def _means(records, field, names):
    found = {}
    for name in names:
        values = plots.series(records, field, name)
        if np.isfinite(values).any():
            found[name] = float(np.nanmean(values))
    return found


def _table(record, domains):
    metrics = metrics_of(record)
    popularity, popularity_mean = (
        record.get("popularity"),
        record.get("popularity_mean") or {},
    )

    def row(label, style, users, figures, baseline):
        cells = [f"{users:,}", *(number(figures.get(metric)) for metric in metrics)]
        if popularity:
            cells += [
                number(baseline.get(HEADLINE)),
                times(figures.get(HEADLINE), baseline.get(HEADLINE)),
            ]
        return {"label": label, "style": style, "cells": cells}

    rows, everyone = [], 0
    for domain in domains:
        figures = record["domains"].get(domain.name) or {}
        users = figures.get("users") or 0
        everyone += users
        baseline = (popularity or {}).get(domain.name) or {}
        rows.append(row(printable(domain.name), domain, users, figures, baseline))
    rows.append(row("mean", None, everyone, record["mean"], popularity_mean))
    kind = "Test" if record["kind"] == "test" else "Best validation so far"
    return {
        "title": f"{kind}, step {record['step']:,}",
        "columns": [
            "users",
            *metrics,
            *((f"popularity {HEADLINE}", "ratio") if popularity else ()),
        ],
        "headline": 1 + metrics.index(HEADLINE) if HEADLINE in metrics else None,
        "rows": rows,
        "too_short": record.get("too_short"),
        "skipped_users": record.get("skipped_users"),
    }


def _read_json(file):
    """A record, or None where it cannot be read: the rest of the page is still good."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _full_table(record):
    """Ranking among all items: a row a domain, and one of means."""
    metrics = [name for name in metrics_of(record) if name != "interval"]

    def row(label, figures, popularity, difference):
        within = (figures["interval"] or {}).get(HEADLINE)
        cells = [
            f"{figures['users']:,}",
            *(number(figures[metric]) for metric in metrics),
            _interval(within),
        ]
        cells += [number(popularity[HEADLINE]), _interval(difference["interval"])]
        return {"label": label, "cells": cells}

    rows = [
        row(
            printable(name),
            figures,
            record["popularity"][name],
            record["difference"]["domains"][name],
        )
        for name, figures in record["domains"].items()
    ]
    rows.append(
        row(
            "mean",
            record["mean"],
            record["popularity_mean"],
            record["difference"]["mean"],
        )
    )
    return {
        "title": f"{record['kind'].capitalize()} among all items of the domain, step {record['step']:,}",
        "columns": [
            "users",
            *metrics,
            f"{HEADLINE} 95 %",
            f"popularity {HEADLINE}",
            "difference 95 %",
        ],
        "rows": rows,
    }


def _nearest(items):
    """Tables of what lies near an item: one a domain, a row for each of its items."""
    tables = {}
    for item in items:
        near = [
            (
                printable(name),
                [f"{printable(other)} ({cosine:.2f})" for other, cosine in found],
            )
            for name, found in item["nearest"].items()
        ]
        tables.setdefault(printable(item["domain"]), []).append(
            {"item": printable(item["item"]), "near": near}
        )
    return tables


def _interval(found):
    return "–" if found is None else f"{found[0]:.4f} to {found[1]:.4f}"


def _signed(value):
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
