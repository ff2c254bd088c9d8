"""Each day's events by the model that served until then, before any model learnt from them, in reports.

The figures are those of trainer/retraining/prequential.py. Days of before, and days on which nothing was
ranked, have none: a line has a gap there.
"""

from typing import Any

import plotly.graph_objects as go

from trainer.evaluation.evaluation import (
    WITH_RECENCY,
    DomainFigures,
    Evaluation,
)
from trainer.reporting import plots
from trainer.reporting.colours import GREY, INK, RED
from trainer.reporting.console import escape_name, format_number
from trainer.reporting.html import Chart
from trainer.run_files import HEADLINE

_MOST_PANELS = 12  # domains, the largest ones
_HEIGHT = 230
_MARGIN = {"l": 52, "r": 36, "t": 10, "b": 36}

Result = dict[str, Any]  # what a day's retrain.json says

ABOUT = (
    "Higher is better. All events of a day, each after what its user did before, ranked by the model that "
    "served until then, before any model learnt from them; dashed: recency popularity over the same events. "
    "A red mark: the model is below recency popularity, and this is no chance."
)


def read_evaluation(result: Result) -> Evaluation | None:
    """A day's figures; None where nothing was ranked, or the day is of before."""
    record = result.get("arrivals")
    if record is None or "skipped" in record:
        return None
    return Evaluation.from_record(record)


def served_figure(evaluation: Evaluation, row: DomainFigures) -> float | None:
    """The model's NDCG@10, with its recency term where that is switched on."""
    if evaluation.has_compared(WITH_RECENCY):
        return row.with_recency_headline
    return row.headline


def mean_row(evaluation: Evaluation) -> DomainFigures:
    """The means over the domains that count."""
    mean, _ = evaluation.mean_rows("mean", "over users")
    return mean


def plot_arrivals(
    results: list[Result], domains: list[plots.Style]
) -> list[Chart] | None:
    """A small plot of the mean and one for each domain, day by day.

    results: of every day, in their order; the lines begin with the first day that has figures. None of
    fewer than two such days.
    """
    evaluations = [read_evaluation(result) for result in results]
    events: dict[str, int] = {}
    evaluated = []
    for day, evaluation in enumerate(evaluations):
        if evaluation is None:
            continue
        evaluated.append(day)
        for name, users in evaluation.users_by_domain.items():
            events[name] = events.get(name, 0) + users
    if len(evaluated) < 2:
        return None
    first = evaluated[0]
    results = results[first:]
    evaluations = evaluations[first:]
    charts = [
        _plot_panel(
            results,
            evaluations,
            None,
        )
    ]
    largest = sorted(events, key=lambda name: -events[name])[:_MOST_PANELS]
    for domain in domains:
        if domain.name in largest and events[domain.name]:
            charts.append(
                _plot_panel(
                    results,
                    evaluations,
                    domain,
                )
            )
    return charts


def _plot_panel(
    results: list[Result],
    evaluations: list[Evaluation | None],
    domain: plots.Style | None,
) -> Chart:
    """The plot of a domain; of the mean where there is none."""
    served: list[float | None] = []
    recency: list[float | None] = []
    for evaluation in evaluations:
        row = DomainFigures("", {}, {})
        if evaluation is not None and domain is None:
            row = mean_row(evaluation)
        elif evaluation is not None and domain is not None:
            row = evaluation.figures_of(domain.name)
        value = None
        if evaluation is not None:
            value = served_figure(evaluation, row)
        served.append(value)
        recency.append(row.recency_headline)
    line = {"color": INK} if domain is None else domain.line
    figure = go.Figure()
    days = _day_labels(results)
    figure.add_scatter(
        x=days,
        y=recency,
        mode="lines",
        name="recency popularity",
        line={"width": 2, "color": GREY, "dash": "dash"},
    )
    figure.add_scatter(
        x=days,
        y=served,
        mode="lines+markers",
        name="yesterday's model",
        line={"width": 2.5, "color": line["color"]},
        marker=_markers(
            results,
            domain,
            line["color"],
        ),
    )
    figure.update_traces(yhoverformat=".4f")
    plots.finish_figure(
        figure,
        _HEIGHT,
        margin=_MARGIN,
        showlegend=False,
    )
    figure.update_xaxes(
        title=None,
        type="category",
        tickformat=None,
        tickvals=[days[0], days[-1]],
        tickangle=0,
    )
    figure.update_yaxes(tickformat=".3~f", nticks=5)
    caption = "mean" if domain is None else escape_name(domain.name)
    return Chart(figure, caption)


def _markers(
    results: list[Result], domain: plots.Style | None, colour: str
) -> dict[str, Any]:
    """A mark for each day, red where the domain is below recency popularity."""
    colours = []
    symbols = []
    sizes = []
    for result in results:
        below = result.get("below_recency", [])
        is_below = domain is not None and domain.name in below
        colours.append(RED if is_below else colour)
        symbols.append("triangle-down" if is_below else "circle")
        sizes.append(12 if is_below else 7)
    return {"color": colours, "symbol": symbols, "size": sizes}


def _day_labels(results: list[Result]) -> list[str]:
    """The days' names as Plotly shows them letter by letter."""
    styles = plots.assign_styles([result["name"] for result in results])
    return [style.label for style in styles]


def describe_arrivals(result: Result) -> list[str]:
    """A section of a day's report.md; nothing of a day of before."""
    record = result.get("arrivals")
    if record is None:
        return []
    lines = ["", "## Yesterday's model on the day's events", ""]
    evaluation = read_evaluation(result)
    if evaluation is None:
        return [*lines, f"Not ranked: {record['skipped']}."]
    lines += [
        f"{HEADLINE} of all events, each after what its user did before, by the model that served, "
        "before any model learnt from them. Events of items that it never saw do not count.",
        "",
        "| domain | events | the model | with recent counts | recency popularity | popularity "
        "| of items it never saw |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    unseen = evaluation.unseen_by_domain
    for row in evaluation.by_domain:
        lines.append(
            _row(
                row,
                row.users,
                unseen.get(row.name),
            )
        )
    mean = mean_row(evaluation)
    lines.append(
        _row(
            mean,
            evaluation.users,
            sum(unseen.values()),
        )
    )
    warnings = result.get("warnings", [])
    if warnings:
        lines += ["", "Below recency popularity, and this is no chance:", ""]
        lines += [f"- {warning}" for warning in warnings]
    return lines


def _row(row: DomainFigures, events: int, unseen: int | None) -> str:
    """A line of the table. unseen: events of items that the model never saw."""
    cells = [
        escape_name(row.name),
        f"{events:,}",
        format_number(row.headline),
        format_number(row.with_recency_headline),
        format_number(row.recency_headline),
        format_number(row.popularity_headline),
        format_number(unseen, ","),
    ]
    return f"| {' | '.join(cells)} |"
