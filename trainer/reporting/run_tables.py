"""The tables of a run's report: figures by domain, groups of users, transfer, gates, near items."""

from collections.abc import Iterable
from typing import Any

from trainer.evaluation.evaluation import (
    COMPARED,
    POPULARITY,
    RECENCY,
    WITH_RECENCY,
    DomainFigures,
    Evaluation,
)
from trainer.reporting.console import (
    escape_name,
    format_number,
    format_ratio,
    format_signed,
    intervals_by_metric,
    metric_cells,
    recency_sentence,
    sentence_on_mean,
    split_sentences,
)
from trainer.reporting.full_ranking_tables import headline
from trainer.reporting.html import Cell, Table
from trainer.reporting.plots import Style
from trainer.reporting.run_records import LAST_SHARE
from trainer.run_files import HEADLINE

_OVER_USERS = "over users"
# How columns name what stands beside the model.
_NAMES = {
    POPULARITY: "popularity",
    RECENCY: "recency",
    WITH_RECENCY: "with recency term",
}
_NOT_COUNTED = " (not in the mean)"
_DARK_SHADE = 0.6  # from it on, letters are white

Record = dict[str, Any]
Titles = dict[str, dict[str, str]]  # by domain: of an item's id


def final_table(
    record: Record | None, domains: list[Style]
) -> dict[str, Any] | None:
    """The figures by domain: a row for each domain, and those of means.

    Returns what the template draws, None without an evaluation:

        title       "Test, step 30"
        note        what recent means, which domains are too small for the mean; or None
        columns     ["users", "HR@5", …, "popularity NDCG@10", "ratio", "recency NDCG@10", "ratio"]
        headline    the index of NDCG@10 among the columns
        rows        [{label, style, cells}, …]; style is None in the rows of means
    """
    if not record:
        return None
    evaluation = Evaluation.from_record(record)
    rows = []
    for domain in domains:
        figures = evaluation.figures_of(domain.name)
        label = _domain_label(evaluation, domain.name)
        cells = _final_cells(evaluation, figures, figures.users)
        rows.append({"label": label, "style": domain, "cells": cells})
    for figures, users in _means(evaluation):
        cells = _final_cells(evaluation, figures, users)
        rows.append({"label": figures.name, "style": None, "cells": cells})
    kind = "Best validation so far"
    if evaluation.kind == "test":
        kind = "Test"
    columns = ["users", *evaluation.metrics]
    position = None
    if HEADLINE in columns:
        position = columns.index(HEADLINE)
    for system in _compared(evaluation):
        columns.append(f"{_NAMES[system]} {HEADLINE}")
        if system != WITH_RECENCY:
            columns.append("ratio")
    return {
        "title": f"{kind}, step {evaluation.step:,}",
        "note": _notes(evaluation),
        "columns": columns,
        "headline": position,
        "rows": rows,
        "too_short": evaluation.too_short,
        "skipped_users": evaluation.skipped_users,
    }


def _domain_label(evaluation: Evaluation, name: str) -> str:
    label = escape_name(name)
    if name in evaluation.small_domains:
        label += _NOT_COUNTED
    return label


def _means(evaluation: Evaluation) -> list[tuple[DomainFigures, int]]:
    """The means over domains and over users, with how many users each is of."""
    small = sum(evaluation.small_domains.values())
    by_domain, over_users = evaluation.mean_rows("mean", _OVER_USERS)
    return [
        (by_domain, evaluation.users - small),
        (over_users, evaluation.users),
    ]


def _compared(evaluation: Evaluation) -> list[str]:
    """The systems that stand beside the model."""
    return [name for name in COMPARED if evaluation.has_compared(name)]


def _notes(evaluation: Evaluation) -> str | None:
    """How events were split by time, what recent means, and what the mean leaves out, as sentences."""
    sentences = split_sentences(evaluation)
    if evaluation.has_recency:
        sentences.append(recency_sentence(evaluation))
    sentence = sentence_on_mean(evaluation)
    if sentence is not None:
        sentences.append(f"{sentence[0].upper()}{sentence[1:]}")
    if not sentences:
        return None
    return " ".join(f"{sentence}." for sentence in sentences)


def _final_cells(
    evaluation: Evaluation, row: DomainFigures, users: int
) -> list[str]:
    """A row's users and metrics, and the comparison with each system that stands beside.

    The ratio is to baselines alone, not to the model itself with its recency term.

    ["204", "0.8800", …, "0.5000", "0.2000", "×2.50"]
    """
    cells = [f"{users:,}", *metric_cells(row.model, evaluation.metrics)]
    for system in _compared(evaluation):
        value = row.compared(system).get(HEADLINE)
        cells.append(format_number(value))
        if system != WITH_RECENCY:
            cells.append(format_ratio(row.headline, value))
    return cells


def full_ranking_tables(record: Record) -> list[Table]:
    """A ranking among all items: the figures by domain, and what users are shown."""
    tables = [_full_table(record)]
    if record.get("recommended"):
        tables.append(_recommended_table(record))
    return tables


def groups_tables(record: Record) -> list[Table]:
    """A ranking among all items: the figures of groups of users."""
    if not record.get("breakdown"):
        return []
    return [_groups_table(record)]


def _title_of(record: Record) -> str:
    """ "Test among all items of the domain" """
    split = str(record["kind"]).capitalize()
    return f"{split} among all items of the domain"


def _full_table(record: Record) -> Table:
    """Ranking among all items: a row for each domain, and those of means.

    Behind the metrics stand the confidence interval of NDCG@10, and for each baseline its NDCG@10
    and the confidence interval of the difference, coloured where it leaves 0 out.
    """
    evaluation = Evaluation.from_record(record)
    metrics = evaluation.metrics
    differences = {POPULARITY: record["difference"]}
    if "recency_difference" in record:
        differences[RECENCY] = record["recency_difference"]
    rows = []
    for row in evaluation.by_domain:
        label = _domain_label(evaluation, row.name)
        of_row = {}
        for system, difference in differences.items():
            of_row[system] = difference["domains"][row.name]
        rows.append(_full_row(label, row, row.users, metrics, of_row))
    for means, users in _means(evaluation):
        key = "user_mean" if means.name == _OVER_USERS else "mean"
        if key not in record["difference"]:
            continue
        of_row = {}
        for system, difference in differences.items():
            of_row[system] = difference[key]
        rows.append(_full_row(means.name, means, users, metrics, of_row))
    columns = ["domain", "users", *metrics, f"{HEADLINE} 95 %"]
    for system in differences:
        columns += [f"{_NAMES[system]} {HEADLINE}", "difference 95 %"]
    if evaluation.has_compared(WITH_RECENCY):
        columns.append(f"{_NAMES[WITH_RECENCY]} {HEADLINE}")
    sentences = [
        "Higher is better. A difference is that to the baseline before it, blue where the model "
        "is surely better, red where it is surely worse."
    ]
    note = _notes(evaluation)
    if note is not None:
        sentences.append(note)
    return Table(
        title=f"{_title_of(record)}, step {evaluation.step:,}",
        text=" ".join(sentences),
        columns=columns,
        rows=rows,
        totals=len(rows) - len(evaluation.by_domain),
    )


def _full_row(
    label: str,
    row: DomainFigures,
    users: int,
    metrics: list[str],
    differences: dict[str, Record],
) -> list[Cell]:
    """A row of a ranking among all items.

    differences: by baseline, {value, interval} of the model's NDCG@10 less the baseline's.

        Books   204   0.0800   …   0.1741   0.1610 to 0.2420   0.1951   −0.0510 to 0.0570
    """
    intervals = intervals_by_metric(row.model)
    own_interval = intervals.get(HEADLINE)
    texts = [
        label,
        f"{users:,}",
        *metric_cells(row.model, metrics),
        _interval(own_interval),
    ]
    cells = _cells(texts)
    for system, difference in differences.items():
        baseline = row.compared(system).get(HEADLINE)
        bounds = difference["interval"]
        cells.append(Cell(format_number(baseline)))
        cells.append(Cell(_interval(bounds), _sense_of(bounds)))
    if row.with_recency:
        cells.append(Cell(format_number(row.with_recency_headline)))
    return cells


def _sense_of(bounds: list[float] | None) -> str:
    """better or worse where an interval leaves 0 out, else nothing."""
    if bounds is None:
        return ""
    low, high = bounds
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return ""


def _cells(texts: Iterable[str]) -> list[Cell]:
    """Cells without a sense."""
    return [Cell(text) for text in texts]


def _groups_table(record: Record) -> Table:
    """The headline metric of each group of users that has any, beside the baselines'.

    Books   item popularity   head   66   0.2366   0.1640 to 0.3150   0.5031   ×0.47
    """
    metric = headline(record)
    systems = [POPULARITY]
    if record.get(RECENCY):
        systems.append(RECENCY)
    rows = []
    for domain, breakdowns in record["breakdown"].items():
        name = escape_name(domain)
        for breakdown, groups in breakdowns.items():
            for group, figures in groups.items():
                if not figures["users"]:
                    continue
                texts = [
                    name,
                    breakdown,
                    group,
                    *_group_texts(figures, metric, systems),
                ]
                rows.append(_cells(texts))
    columns = [
        "domain",
        "users by",
        "group",
        "users",
        metric,
        f"{metric} 95 %",
    ]
    for system in systems:
        columns += [f"{_NAMES[system]} {metric}", "ratio"]
    return Table(
        title=f"{_title_of(record)}: groups of users",
        text="By popularity of the held-out item (thirds of the domain's interactions), by length "
        "of the history, and by how much of it lies in the domain: users with none there are whom "
        "cross-domain training is for. A ratio above ×1 beats the baseline before it.",
        columns=columns,
        rows=rows,
        words=("users by", "group"),
    )


def _group_texts(figures: Record, metric: str, systems: list[str]) -> list[str]:
    """A group's users and figures: 66, 0.2366, 0.1640 to 0.3150, 0.5031, ×0.47."""
    users = figures["users"]
    value = figures[metric]
    intervals = intervals_by_metric(figures)
    texts = [
        f"{users:,}",
        format_number(value),
        _interval(intervals.get(metric)),
    ]
    for system in systems:
        baseline = figures.get(f"{system} {metric}")
        texts.append(format_number(baseline))
        texts.append(format_ratio(value, baseline))
    return texts


def _recommended_table(record: Record) -> Table:
    """Catalogue coverage and the Gini index of what all users are recommended.

    domain   test users   items   coverage   Gini
    Books           204   1,310     0.4100   0.8120
    """
    evaluation = Evaluation.from_record(record)
    measures: list[str] = []
    rows = []
    for domain, figures in record["recommended"].items():
        _, *measures = figures
        users = evaluation.figures_of(domain).users
        items = figures["items"]
        texts = [
            escape_name(domain),
            f"{users:,}",
            f"{items:,}",
            *metric_cells(figures, measures),
        ]
        rows.append(_cells(texts))
    return Table(
        title=f"{_title_of(record)}: what users are shown",
        text="Coverage: the share of the catalogue that anybody is shown; higher is better for "
        "long-tailed catalogues. Gini: 0 where all items are shown alike often, 1 where one item "
        "has everything; lower is more even.",
        columns=["domain", "test users", "items", *measures],
        rows=rows,
    )


def transfer_table(
    gaps: dict[str, float],
    weights: dict[str, float],
    best_weights: dict[str, float | None],
    users: dict[str, int],
) -> Table | None:
    """φ and λ by domain at the end of the run, and λ of the best model; None where there is neither.

        domain   users   φ at the end   λ at the end   λ of the best model
        ads        204   −0.485, red    0.511          0.640
        video      310   0.088, blue    1.427          1.300

    gaps, weights: means at the end. users: evaluated ones.
    """
    names = list(dict.fromkeys([*gaps, *weights, *best_weights]))
    if not names:
        return None
    columns = ["domain", "users", "φ at the end"]
    if weights:
        columns.append("λ at the end")
    if best_weights:
        columns.append("λ of the best model")
    rows = []
    for name in names:
        count = users.get(name, 0)
        texts = [escape_name(name), f"{count:,}"]
        row = _cells(texts)
        row.append(_gap_cell(gaps.get(name)))
        for by_domain in (weights, best_weights):
            if by_domain:
                weight = by_domain.get(name)
                text = format_number(weight, ".3f")
                row.append(Cell(text))
        rows.append(row)
    return Table(
        title="Transfer at the end of the run",
        text="φ above 0 (blue): the other domains help this one; below 0 (red): they harm it, "
        "which is negative transfer. λ is a domain's weight in the loss, 1 where all weigh alike: "
        "below 1 the loss correction holds the domain back. At the end: means over the last "
        f"{LAST_SHARE:.0%} of the steps.",
        columns=columns,
        rows=rows,
    )


def _gap_cell(gap: float | None) -> Cell:
    """φ of a domain: good above 0."""
    text = format_signed(gap)
    if gap is None:
        return Cell(text)
    sense = "worse" if gap < 0 else "better"
    return Cell(text, sense)


def gates_table(gates: Record) -> dict[str, Any] | None:
    """Mean weights of the experts (columns), by domains of both views (rows); None without gates.

    gates: as an inspection has them (trainer/evaluation/inspect.py), here of two experts:

        {"cross": {"Books": [0.8, 0.2], "Toys": [0.4, 0.6]}, "single": {"Books": [0.5, 0.5]}}

    Returns experts, their names, and rows of label and cells: text, shade (0 to 1), and whether it
    is a dark one.
    """
    labels = {"cross": "cross-domain gate: {}", "single": "{}, its own gate"}
    rows = []
    experts: list[str] = []
    for view, label in labels.items():
        by_domain = gates.get(view) or {}
        for name, weights in by_domain.items():
            escaped = escape_name(name)
            row = {
                "label": label.format(escaped),
                "cells": _gate_cells(weights),
            }
            rows.append(row)
            count = len(weights)
            experts = [f"expert {index + 1}" for index in range(count)]
    if not rows:
        return None
    return {"experts": experts, "rows": rows}


def _gate_cells(weights: list[float]) -> list[Record]:
    """The cells of a row of gates. Even weights are half as dark as can be."""
    twice_even = 2 / len(weights)
    darkest = max(twice_even, *weights)
    cells = []
    for weight in weights:
        shade = weight / darkest
        cell = {
            "text": f"{weight:.2f}",
            "shade": f"{shade:.2f}",
            "dark": shade > _DARK_SHADE,
        }
        cells.append(cell)
    return cells


def nearest_items(
    items: list[Record], titles: Titles
) -> dict[str, list[dict[str, Any]]]:
    """Tables of what lies near an item: one for each domain, a row for each of its items.

    items: as an inspection has them (trainer/evaluation/inspect.py). An item without a title goes
    by its id. Returns

        {"Books": [{"item": "Emma", "near": [("Books", ["Persuasion (0.93)"]), ("Toys", [])]}]}
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        near = []
        for domain, neighbours in item["nearest"].items():
            texts = []
            for neighbour, cosine in neighbours:
                title = _title(titles, domain, neighbour)
                texts.append(f"{title} ({cosine:.2f})")
            near.append((escape_name(domain), texts))
        row = {
            "item": _title(titles, item["domain"], item["item"]),
            "near": near,
        }
        rows = tables.setdefault(escape_name(item["domain"]), [])
        rows.append(row)
    return tables


def _title(titles: Titles, domain: str, item: str) -> str:
    title = titles.get(domain, {}).get(item)
    return escape_name(title or item)


def _interval(bounds: list[float] | None) -> str:
    """0.3000 to 0.4000, with true minus signs; a dash for none."""
    if bounds is None:
        return "–"
    low, high = bounds
    text = f"{low:.4f} to {high:.4f}"
    return text.replace("-", "\N{MINUS SIGN}")
