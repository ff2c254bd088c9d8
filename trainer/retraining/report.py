"""All days of a retraining on one page: metrics, new items, drift and time, day by day."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from trainer.evaluation.metrics import domains_of_mean
from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.colours import INK, RED
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
)
from trainer.reporting.html import (
    Cell,
    Section,
    Table,
    page_title,
    render_sections,
    render_table_page,
)
from trainer.retraining.arrivals_report import (
    ABOUT,
    mean_row,
    plot_arrivals,
    read_evaluation,
    served_figure,
)
from trainer.retraining.changes_report import after_refusal, describe_carried
from trainer.run_files import HEADLINE, REPORT

_NORMAL = 1.96  # standard errors of a 95 % interval
_SHOWN = 30  # rows of the table, the newest days

Result = dict[str, Any]  # what a day's retrain.json says


def write_days(
    folder: Path,
    results: list[Result],
) -> Path:
    """Writes the page of a retraining's folder. results: of every day, in their order."""
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result["domains"])
    domains = plots.assign_styles(list(names))
    page = render_table_page(
        page_title(folder),
        "retraining",
        _lead(results[-1]),
        [_days_table(results)],
        _sections(results, domains),
        {},
    )
    write_text(folder / REPORT, page)
    return folder / REPORT


def _lead(newest: Result) -> list[str]:
    """Sentences on the newest day."""
    name = newest["name"]
    carried = describe_carried(newest)
    warnings = []
    for warning in newest.get("warnings", []):
        warnings.append(f"Warning: {warning}.")
    if newest["published"]:
        lead = f"{name}: published as version {newest['published']}."
        return [" ".join([lead, *carried]), *warnings]
    reasons = "; ".join(newest["reasons"])
    lead = f"{name}: not published, the model of before goes on serving. {reasons}."
    return [" ".join([lead, after_refusal(name), *carried]), *warnings]


def _sections(
    results: list[Result],
    domains: list[plots.Style],
) -> list[dict]:
    """Plots, with a title and a sentence each."""
    sections: list[Section] = [
        (
            f"{HEADLINE} day by day",
            "Higher is better. The newest held-out items by each day's own model; dashed: the mean "
            "by the model that served until then, which the day's is compared with. A red band: "
            "the day was refused, and the model of before went on serving.",
            _plot_metrics(results, domains),
        ),
        (
            "Yesterday's model on today's events",
            ABOUT,
            plot_arrivals(results, domains),
        ),
        (
            "New items",
            "Items that the day's logs brought into each domain.",
            _plot_new_items(results, domains),
        ),
        (
            "How far item vectors moved",
            "Mean cosine of an item's vector and the one before: 1 has not moved. Near 1 is good "
            "where nothing has changed; a fall says that the day's logs are unlike those before.",
            _plot_drift(results, domains),
        ),
        (
            "Time",
            "Seconds of each stage; lower is better.",
            _plot_time(results),
        ),
    ]
    return render_sections(sections)


def _plot_metrics(
    results: list[Result],
    domains: list[plots.Style],
) -> go.Figure | None:
    """A line for each domain, and means of the day's model and of the one until then.

    None of a single day: the table has its figures.
    """
    if len(results) < 2:
        return None
    figure = go.Figure()
    days = _day_labels(results)
    symbols = []
    sizes = []
    for result in results:
        symbols.append("circle" if result["published"] else "x")
        sizes.append(7 if result["published"] else 12)
    for domain in domains:
        values = []
        for result in results:
            figures = result["domains"].get(domain.name) or {}
            values.append(figures.get("candidate"))
        figure.add_scatter(
            x=days,
            y=values,
            mode="lines+markers",
            name=domain.label,
            line={"width": 2, **domain.line},
            marker={"size": sizes, "symbol": symbols},
        )
    _add_mean(
        figure,
        results,
        "candidate",
        "mean",
        "solid",
    )
    _add_mean(
        figure,
        results,
        "current",
        "mean, until then",
        "dash",
    )
    _mark_refused(figure, results)
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(tickformat=".3~f")
    return _by_day(figure, 420, HEADLINE)


def _mark_refused(figure: go.Figure, results: list[Result]) -> None:
    """A red band, with a word, over each day that was not published."""
    for position, result in enumerate(results):
        if result["published"]:
            continue
        figure.add_vrect(
            x0=position - 0.4,
            x1=position + 0.4,
            fillcolor=RED,
            opacity=0.14,
            line_width=0,
            layer="below",
        )
        figure.add_annotation(
            text="refused",
            textangle=-90 if len(results) > 12 else 0,
            showarrow=False,
            font={"size": 12, "color": RED},
            x=position,
            y=1,
            yref="paper",
            yanchor="bottom" if len(results) <= 12 else "top",
        )


def _add_mean(
    figure: go.Figure,
    results: list[Result],
    model: str,
    label: str,
    dash: str,
) -> None:
    """Adds a model's mean over domains, where any day has one."""
    means = [_mean(result, model) for result in results]
    if all(mean is None for mean in means):
        return
    figure.add_scatter(
        x=_day_labels(results),
        y=means,
        mode="lines",
        name=label,
        line={"width": 3.5, "color": INK, "dash": dash},
    )


def _plot_new_items(
    results: list[Result],
    domains: list[plots.Style],
) -> go.Figure | None:
    """Stacked bars: items that each day brought, by domain (item cold start)."""
    figure = go.Figure()
    extended = [result for result in results if result["extension"]]
    for domain in domains:
        counts = []
        for result in extended:
            items = result["extension"]["domains"].get(domain.name, {})
            counts.append(items.get("new", 0))
        if not any(counts):
            continue
        figure.add_bar(
            x=_day_labels(extended),
            y=counts,
            name=domain.label,
            marker=plots.bar_marker(domain),
        )
    return _by_day(
        figure,
        300,
        "new items",
        barmode="stack",
        showlegend=True,
    )


def _plot_drift(
    results: list[Result],
    domains: list[plots.Style],
) -> go.Figure | None:
    """A line for each domain: the mean cosine of items' vectors with those before."""
    figure = go.Figure()
    measured = [result for result in results if result["drift"]]
    if len(measured) < 2:
        return None
    for domain in domains:
        cosines = []
        for result in measured:
            drift = result["drift"].get(domain.name, {})
            cosines.append(drift.get("mean"))
        if all(cosine is None for cosine in cosines):
            continue
        figure.add_scatter(
            x=_day_labels(measured),
            y=cosines,
            mode="lines+markers",
            name=domain.label,
            line={"width": 2, **domain.line},
        )
    figure.update_traces(yhoverformat=".3f", showlegend=True)
    return _by_day(figure, 300, "mean cosine")


def _plot_time(results: list[Result]) -> go.Figure | None:
    """Stacked bars: each day's seconds, by stage."""
    figure = go.Figure()
    days = _day_labels(results)
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result["seconds"])
    stages = list(names)
    for stage, style in zip(stages, plots.assign_styles(stages), strict=True):
        figure.add_bar(
            x=days,
            y=[result["seconds"].get(stage, 0) for result in results],
            name=stage,
            marker_color=style.colour,
        )
    figure.update_traces(yhoverformat=",.0f")
    return _by_day(
        figure,
        300,
        "seconds",
        barmode="stack",
        showlegend=True,
    )


def _day_labels(results: list[Result]) -> list[str]:
    """The days' names as Plotly shows them letter by letter."""
    styles = plots.assign_styles([result["name"] for result in results])
    return [style.label for style in styles]


def _by_day(
    figure: go.Figure,
    height: int,
    y_title: str,
    **layout: Any,
) -> go.Figure | None:
    """The figure in the report's look, a day a tick; None where nothing is drawn in it."""
    figure = plots.finish_figure(
        figure,
        height,
        y_title,
        **layout,
    )
    if figure is None:
        return None
    return figure.update_xaxes(
        title=None,
        type="category",
        tickformat=None,
    )


def _days_table(results: list[Result]) -> Table:
    """A line for each of the newest days."""
    columns = [
        "day",
        "published",
        "users",
        HEADLINE,
        "the model until then",
        "on the day's events",
        "recent",
        "rows",
        "new items",
        "time",
    ]
    text = (
        f"The newest first, {_SHOWN} at most. Users whose newest item was ranked; {HEADLINE} is "
        "the mean of the domains that count, blue or red where the 95 % interval of the "
        "difference leaves 0 out. On the day's events: the figure of the model until then on all of them, "
        "before any model learnt from them; recent: of recency popularity; red where a domain is below "
        "it and this is no chance. Each day's report.md says more."
    )
    rows = [_days_row(result) for result in reversed(results[-_SHOWN:])]
    return Table("Days", text, columns, rows)


def _days_row(result: Result) -> list[Cell]:
    """The line of a day."""
    published = Cell("refused", "worse")
    if result["published"]:
        published = Cell(f"version {result['published']}")
    candidate = _mean(result, "candidate")
    current = _mean(result, "current")
    sense = _sense(result)
    users = sum(figures["users"] for figures in result["domains"].values())
    arrived = None
    new_items = 0
    if result["extension"]:
        arrived = result["extension"]["arrived"]
        for counts in result["extension"]["domains"].values():
            new_items += counts["new"]
    return [
        Cell(escape_name(result["name"])),
        published,
        Cell(f"{users:,}"),
        Cell(format_number(candidate), sense),
        Cell(format_number(current)),
        *_arrivals_cells(result),
        Cell(format_number(arrived, ",")),
        Cell(f"{new_items:,}"),
        Cell(format_duration(sum(result["seconds"].values()))),
    ]


def _arrivals_cells(result: Result) -> list[Cell]:
    """The means of the model until then and of recency popularity on the day's events."""
    evaluation = read_evaluation(result)
    if evaluation is None:
        return [Cell("–"), Cell("–")]
    mean = mean_row(evaluation)
    sense = "worse" if result.get("below_recency") else ""
    return [
        Cell(format_number(served_figure(evaluation, mean)), sense),
        Cell(format_number(mean.recency_headline)),
    ]


def _sense(result: Result) -> str:
    """better or worse where the 95 % interval of the mean difference leaves 0 out, else nothing."""
    values = []
    variance = 0.0
    for name in _counted(result):
        difference = result["domains"][name]["difference"] or {}
        if difference.get("value") is None:
            continue
        error = difference.get("error")
        if error is None and difference.get("interval"):
            low, high = difference["interval"]
            error = (high - low) / (2 * _NORMAL)
        if error is None:
            return ""
        values.append(difference["value"])
        variance += error**2
    total = sum(values)
    if abs(total) <= _NORMAL * math.sqrt(variance):
        return ""
    return "better" if total > 0 else "worse"


def _counted(result: Result) -> list[str]:
    """The domains that count in the mean: `evaluation.min_users`, 1 in days of before."""
    users = {}
    for name, figures in result["domains"].items():
        users[name] = figures["users"]
    return domains_of_mean(users, result.get("min_users", 1))


def _mean(
    result: Result,
    model: str,
) -> float | None:
    """A model's mean over the domains that count. model: candidate or current."""
    values = []
    for name in _counted(result):
        figures = result["domains"][name]
        if figures[model] is not None:
            values.append(figures[model])
    if not values:
        return None
    return float(np.mean(values))
