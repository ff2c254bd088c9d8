"""`report.html`: a run on one page, readable with no network.

It is drawn from the run's `metrics.jsonl` and `config.yaml`, and from the inspection of the best
model and rankings among all items, where the run's folder has them.

Plotly's JavaScript stands in the page, whose content security policy forbids every request. All
words from outside (domain names, the config) are escaped: by Jinja2 in the page, by `plots.styles`
in the plots, as Plotly reads some HTML in labels.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.evaluation import DomainFigures, Evaluation
from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
    format_ratio,
    metric_cells,
)
from trainer.reporting.html import load_template, render_sections
from trainer.reporting.run_log import (
    count_skipped_users,
    read_records,
    skipped_sentence,
)
from trainer.run_files import CONFIG, FULL, HEADLINE, LOOK, METRICS_FILE, REPORT

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LAST_SHARE = 0.2  # of the train lines: what "at the end" means

Record = dict[str, Any]
Section = tuple[str, str, "Figure | None"]  # title, sentence, plot


@dataclass(frozen=True)
class RunRecords:
    """A run's records by kind. best: the best validation so far; test: the last test."""

    every: list[Record]
    train: list[Record]
    validations: list[Record]
    best: Record | None
    test: Record | None

    @classmethod
    def read(cls, file: Path) -> "RunRecords":
        """Reads a metrics.jsonl."""
        records = read_records(file)
        train = _of_kind(records, "train")
        validations = _of_kind(records, "validation")
        tests = _of_kind(records, "test")
        best = max(
            validations,
            key=_mean_ndcg,
            default=None,
        )
        test = tests[-1] if tests else None
        return cls(records, train, validations, best, test)

    @property
    def final(self) -> Record | None:
        """The record whose figures the page shows: of the test, or of the best validation."""
        return self.test or self.best

    def domain_names(self) -> list[str]:
        """All domains that occur in a record, in their order."""
        names: dict[str, None] = {}
        fields = (
            "single_by_domain",
            "cross_by_domain",
            "lambda",
            "phi",
            "domains",
        )
        for record in self.every:
            for field in fields:
                by_domain = record.get(field) or {}
                names |= dict.fromkeys(by_domain)
        return list(names)

    def seconds(self) -> float:
        """Seconds over all records; a clock that goes back was started anew by a resume.

        seconds of the records    10    20    5    15
        total                     10    20    25   35
        """
        total = 0.0
        before = 0.0
        for record in self.every:
            now = record.get("seconds")
            if now is None:
                continue
            if now >= before:
                total += now - before
            else:
                total += now
            before = now
        return total


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _mean_ndcg(record: Record) -> float:
    """The key by which the best validation is chosen."""
    value = record["mean"].get(HEADLINE)
    if value is None:
        return -1.0
    return value


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html` from what the run has logged so far and returns its path.

    A run without evaluations, without λ or with a torn last line gives a page that says so in place
    of those parts. Raises InputError when the folder has no metrics.jsonl.
    """
    folder = Path(folder)
    file = folder / METRICS_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: not found; name the folder of a run that has started to train"
        )
    records = RunRecords.read(file)
    domains = plots.assign_styles(records.domain_names())
    names = [domain.name for domain in domains]
    look = _read_json(folder / LOOK) or {}
    items = look.get("items") or []
    page = load_template(Path(__file__).with_name("report.html.jinja"))
    text = page.render(
        name=folder.resolve().name,
        cards=_cards(records),
        skipped=_skipped(records.train),
        findings=_findings(records.train, names),
        last_share=f"{LAST_SHARE:.0%}",
        final=_final_table(records.final, domains),
        full=_full_tables(folder),
        sections=_sections(records, look, domains),
        nearest=_nearest_items(items),
        thinning=_thinning(len(records.train)),
        config=_config_text(folder),
    )
    path = folder / REPORT
    write_text(path, text)
    return path


def _skipped(train: list[Record]) -> str | None:
    """The sentence on users who were skipped in training, None without any."""
    users = count_skipped_users(train)
    if not users:
        return None
    return skipped_sentence(users)


def _config_text(folder: Path) -> str | None:
    config = folder / CONFIG
    if not config.is_file():
        return None
    return config.read_text(encoding="utf-8", errors="replace")


def _sections(
    records: RunRecords, look: Record, domains: list[plots.Style]
) -> list[dict[str, Any]]:
    """The plots in order, each with a title, a sentence and its HTML, or None without a plot."""
    sections = [
        *_transfer_sections(records.train, domains),
        *_evaluation_sections(records, domains),
        *_look_sections(look, domains),
        *_speed_sections(records.train),
    ]
    return render_sections(sections)


def _transfer_sections(
    train: list[Record], domains: list[plots.Style]
) -> list[Section]:
    """Losses, λ and φ: what each domain gives the others."""
    return [
        (
            "Loss and its parts",
            "The loss that is minimised, its single-domain and cross-domain parts, "
            "and the mutual-information loss.",
            plots.loss_plot(train),
        ),
        (
            "λ by domain",
            "The weight of each domain in the cross-domain loss; "
            "a small λ holds back a domain that the others harm.",
            plots.weight_plot(train, domains),
        ),
        (
            "φ by domain: the negative transfer gap",
            "Single-domain minus cross-domain loss over the same targets; "
            "below 0 the other domains harm the prediction.",
            plots.gap_plot(train, domains),
        ),
        (
            "Single-domain and cross-domain loss by domain",
            "Grey: predicted from the domain's own history. "
            "Coloured: predicted from the history over all domains.",
            plots.pairs_plot(train, domains),
        ),
    ]


def _evaluation_sections(
    records: RunRecords, domains: list[plots.Style]
) -> list[Section]:
    """Validations over the steps, and the final figures."""
    mean = "The black line is the mean; the" if len(domains) > 1 else "The"
    return [
        (
            f"Validation {HEADLINE} by domain",
            f"{mean} dotted upright marks the best step.",
            plots.validation_plot(records.validations, records.best, domains),
        ),
        (
            "All metrics by domain",
            "The figures of the table above.",
            plots.metrics_plot(records.final, domains),
        ),
    ]


def _look_sections(look: Record, domains: list[plots.Style]) -> list[Section]:
    """Plots of what the best model is like, where it has been inspected and has such parts."""
    gates = look.get("gates") or {}
    weights = look.get("lambda") or {}
    sections = [
        (
            "Gates: which experts a domain uses",
            "The mean weight of each expert in the best model: of the cross-domain gate by the "
            "domain of a token's item, and of each domain's own gate.",
            plots.gates_plot(gates),
        ),
        (
            "λ in the end",
            "Of the best model. The line is what equal weights would be.",
            plots.final_weights_plot(weights, domains),
        ),
    ]
    drawn = []
    for title, text, plot in sections:
        if plot is not None:
            drawn.append((title, text, plot))
    return drawn


def _speed_sections(train: list[Record]) -> list[Section]:
    """How fast the run was, and what the optimizer did."""
    return [
        (
            "Speed",
            "Users trained per second over all ranks, the share of the time spent waiting for "
            "data, and memory in use.",
            plots.panels_plot(train, plots.SPEED),
        ),
        (
            "Optimisation",
            "The learning rate, the norm of the gradient before clipping, and the scales α and β "
            "of the λ update.",
            plots.panels_plot(train, plots.OPTIMISATION),
        ),
    ]


def _thinning(lines: int) -> str:
    """The sentence below the plots that says how they were drawn. lines: of the train log."""
    text = (
        "Bold lines are moving means over the faint lines of the logged figures"
    )
    size = -(-lines // plots.MAX_POINTS)
    end = "."
    if size > 1:
        end = f", each point of which is the mean of {size} log lines."
    return f"{text}{end} Drag to zoom, double-click to go back, click a name to hide it."


def _median(train: list[Record], field: str) -> float | None:
    """The median of a field over the train records that have it, None where none has."""
    values = plots.series(train, field)
    if not np.isfinite(values).any():
        return None
    return float(np.nanmedian(values))


def _cards(records: RunRecords) -> list[tuple[str, str, str]]:
    """The headline figures: (title, figure, note) each.

    Test NDCG@10            Best validation NDCG@10    Duration     Users per second
    0.2500                  0.1300                     0:00:30      1,000
    mean, ×2.50 popularity  mean, at step 30           30 steps     median, 25.0% waiting …
    """
    steps = max((record["step"] for record in records.every), default=0)
    clock = format_duration(records.seconds())
    return [
        _test_card(records.test),
        _validation_card(records.best),
        ("Duration", clock, f"{steps:,} steps"),
        _speed_card(records.train),
    ]


def _test_card(test: Record | None) -> tuple[str, str, str]:
    """The mean test metric, and how many times popularity's it is."""
    title = f"Test {HEADLINE}"
    if not test:
        return title, "–", "no test yet"
    evaluation = Evaluation.from_record(test)
    mean = evaluation.mean_ndcg
    note = "mean"
    ratio = format_ratio(mean, evaluation.popularity_mean_ndcg)
    if ratio != "–":
        note = f"mean, {ratio} popularity"
    return title, format_number(mean), note


def _validation_card(best: Record | None) -> tuple[str, str, str]:
    """The mean metric of the best validation, and its step."""
    title = f"Best validation {HEADLINE}"
    if not best:
        return title, "–", "no validation yet"
    evaluation = Evaluation.from_record(best)
    return (
        title,
        format_number(evaluation.mean_ndcg),
        f"mean, at step {evaluation.step:,}",
    )


def _speed_card(train: list[Record]) -> tuple[str, str, str]:
    """The median speed, and the median share of the time spent waiting for data."""
    speed = _median(train, "users_per_second")
    wait = _median(train, "data_wait")
    note = "median"
    if wait is not None:
        note = f"median, {wait:.1%} waiting for data"
    return "Users per second", format_number(speed, ",.0f"), note


def _findings(train: list[Record], names: list[str]) -> list[str]:
    """Sentences on how the run ended: negative transfer, the smallest λ, a loss that was lost.

    Domains' figures are means over the last LAST_SHARE of the train lines.
    """
    lines = round(len(train) * LAST_SHARE)
    lines = max(1, lines)
    last = train[-lines:]
    gaps = _means(last, "phi", names)
    weights = _means(last, "lambda", names)
    sentences = [
        *_gap_sentences(gaps, names),
        *_weight_sentences(weights),
    ]
    lost = []
    for record in train:
        if record.get("loss") is None:
            lost.append(record["step"])
    if lost:
        count = f"{len(lost):,} of {len(train):,} train lines"
        sentences.append(
            f"The loss was not a finite number in {count}, first at step {lost[0]:,}."
        )
    return sentences


def _gap_sentences(gaps: dict[str, float], names: list[str]) -> list[str]:
    """Where transfer was negative. gaps: mean φ by domain.

    1 of 2 domains ended with negative transfer: Toys (φ −0.250).
    No φ was logged at the end for Music.
    """
    if not gaps:
        return []
    sentences = []
    negative = []
    for name, gap in gaps.items():
        if gap < 0:
            negative.append(f"{escape_name(name)} (φ {_signed(gap)})")
    if negative:
        domains = "domains" if len(gaps) > 1 else "domain"
        count = f"{len(negative)} of {len(gaps)} {domains}"
        listed = ", ".join(negative)
        sentences.append(f"{count} ended with negative transfer: {listed}.")
    else:
        sentences.append(
            "No domain ended with negative transfer: no mean φ is below 0."
        )
    absent = []
    for name in names:
        if name not in gaps:
            absent.append(escape_name(name))
    if absent:
        listed = ", ".join(absent)
        sentences.append(f"No φ was logged at the end for {listed}.")
    return sentences


def _weight_sentences(weights: dict[str, float]) -> list[str]:
    """Which domain had the smallest weight. weights: mean λ by domain.

    Smallest λ: Toys with 0.125; equal weights would be 0.333.
    """
    if len(weights) < 2:
        return []
    name = min(weights, key=weights.get)
    smallest = weights[name]
    total = sum(weights.values())
    equal = total / len(weights)
    return [
        f"Smallest λ: {escape_name(name)} with {smallest:.3f}; "
        f"equal weights would be {equal:.3f}."
    ]


def _means(
    records: list[Record], field: str, names: list[str]
) -> dict[str, float]:
    """The mean of a field by domain, of domains that have a figure. Of two records' "phi":

    {"Books": 0.1, "Toys": null}
    {"Books": 0.3}
    means {"Books": 0.2}
    """
    means = {}
    for name in names:
        values = plots.series(records, field, name)
        if np.isfinite(values).any():
            means[name] = float(np.nanmean(values))
    return means


def _final_table(
    record: Record | None, domains: list[plots.Style]
) -> dict[str, Any] | None:
    """The figures by domain: a row for each domain, and one of means.

    Returns what the template draws, None without an evaluation:

        title       "Test, step 30"
        columns     ["users", "HR@5", …, "popularity NDCG@10", "ratio"]
        headline    the index of NDCG@10 among the columns
        rows        [{label, style, cells}, …]; style is None in the row of means
    """
    if not record:
        return None
    evaluation = Evaluation.from_record(record)
    rows = []
    users = 0
    for domain in domains:
        figures = evaluation.figures_of(domain.name)
        users += figures.users
        cells = _final_cells(evaluation, figures, figures.users)
        rows.append(
            {
                "label": escape_name(domain.name),
                "style": domain,
                "cells": cells,
            }
        )
    popularity_mean = evaluation.popularity_mean or {}
    means = DomainFigures("mean", evaluation.mean, popularity_mean)
    cells = _final_cells(evaluation, means, users)
    rows.append(
        {
            "label": "mean",
            "style": None,
            "cells": cells,
        }
    )
    kind = "Best validation so far"
    if evaluation.kind == "test":
        kind = "Test"
    columns = ["users", *evaluation.metrics]
    headline = None
    if HEADLINE in columns:
        headline = columns.index(HEADLINE)
    if evaluation.has_popularity:
        columns += [f"popularity {HEADLINE}", "ratio"]
    return {
        "title": f"{kind}, step {evaluation.step:,}",
        "columns": columns,
        "headline": headline,
        "rows": rows,
        "too_short": evaluation.too_short,
        "skipped_users": evaluation.skipped_users,
    }


def _final_cells(
    evaluation: Evaluation, row: DomainFigures, users: int
) -> list[str]:
    """A row's users and metrics, and the comparison with popularity where there is one.

    ["204", "0.8800", …, "0.5000", "0.2000", "×2.50"]
    """
    cells = [f"{users:,}", *metric_cells(row.model, evaluation.metrics)]
    if evaluation.has_popularity:
        popularity = row.popularity_headline
        cells.append(format_number(popularity))
        cells.append(format_ratio(row.headline, popularity))
    return cells


def _read_json(file: Path) -> Record | None:
    """A record, or None where it cannot be read: the rest of the page is still good."""
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, ValueError):
        return None


def _full_tables(folder: Path) -> list[dict[str, Any]]:
    """A table of each ranking among all items that the run has."""
    tables = []
    for file in sorted(folder.glob(f"{FULL}-*.json")):
        record = _read_json(file)
        if record:
            tables.append(_full_table(record))
    return tables


def _full_table(record: Record) -> dict[str, Any]:
    """Ranking among all items: a row for each domain, and one of means.

    Behind the metrics stand the confidence interval of NDCG@10, popularity's NDCG@10, and the
    confidence interval of the difference. Returns what the template draws:

        title      "Test among all items of the domain, step 30"
        columns    ["users", "HR@1", …, "MRR", "NDCG@10 95 %", …, "difference 95 %"]
        rows       [{label, cells}, …]
    """
    evaluation = Evaluation.from_record(record)
    metrics = evaluation.metrics
    differences = record["difference"]
    rows = []
    for row in evaluation.by_domain:
        difference = differences["domains"][row.name]
        cells = _full_cells(row, metrics, difference)
        rows.append({"label": escape_name(row.name), "cells": cells})
    means = DomainFigures("mean", evaluation.mean, evaluation.popularity_mean)
    cells = _full_cells(means, metrics, differences["mean"])
    rows.append({"label": "mean", "cells": cells})
    split = evaluation.kind.capitalize()
    columns = [
        "users",
        *metrics,
        f"{HEADLINE} 95 %",
        f"popularity {HEADLINE}",
        "difference 95 %",
    ]
    return {
        "title": f"{split} among all items of the domain, step {evaluation.step:,}",
        "columns": columns,
        "rows": rows,
    }


def _full_cells(
    row: DomainFigures, metrics: list[str], difference: Record
) -> list[str]:
    """A row of a ranking among all items.

    difference: {value, interval} of the model's NDCG@10 less popularity's.

        ["204", "0.0800", …, "0.1741", "0.1610 to 0.2420", "0.1951", "-0.0510 to 0.0570"]
    """
    intervals = row.model["interval"] or {}
    return [
        f"{row.users:,}",
        *metric_cells(row.model, metrics),
        _interval(intervals.get(HEADLINE)),
        format_number(row.popularity[HEADLINE]),
        _interval(difference["interval"]),
    ]


def _nearest_items(items: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """Tables of what lies near an item: one for each domain, a row for each of its items.

    items: as an inspection has them (trainer/evaluation/inspect.py). Returns

        {"Books": [{"item": "Emma", "near": [("Books", ["Persuasion (0.93)"]), ("Toys", [])]}]}
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        near = []
        for domain, neighbours in item["nearest"].items():
            texts = []
            for neighbour, cosine in neighbours:
                texts.append(f"{escape_name(neighbour)} ({cosine:.2f})")
            near.append((escape_name(domain), texts))
        title = escape_name(item["domain"])
        row = {
            "item": escape_name(item["item"]),
            "near": near,
        }
        rows = tables.setdefault(title, [])
        rows.append(row)
    return tables


def _interval(bounds: list[float] | None) -> str:
    if bounds is None:
        return "–"
    low, high = bounds
    return f"{low:.4f} to {high:.4f}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return text.replace("-", "\N{MINUS SIGN}")


def update_report(run: Path) -> None:
    """Writes the run's report anew. One that cannot be written stays as it was, which is said."""
    from trainer.distributed.run_lock import lock_run_folder

    if not (run / METRICS_FILE).is_file():
        return
    try:
        with lock_run_folder(run):
            write_report(run)
    except InputError as error:
        print(
            f"{error}: its report stays as it was",
            file=sys.stderr,
            flush=True,
        )
    except OSError as error:
        print(
            f"{run}: cannot be written ({error.strerror}): its report stays as it was",
            file=sys.stderr,
            flush=True,
        )
