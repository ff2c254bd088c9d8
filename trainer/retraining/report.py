"""All days of a retraining on one page: how well each day's model does, what came, how far vectors moved, what it took."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.html import Cell, Table, rendered, table_page
from trainer.reporting.run_log import HEADLINE, duration, number, printable

PAGE = "report.html"
_SHOWN = 30  # rows of the table, the newest days


def write_days(folder: Path, results: list[dict]) -> Path:
    """Writes the page of a retraining's folder. results: what each day's retrain.json says, in their order."""
    domains = plots.styles(
        list(dict.fromkeys(name for result in results for name in result["domains"]))
    )
    page = table_page(
        folder.name,
        "retraining",
        _lead(results[-1]),
        [_table(results)],
        _sections(results, domains),
        {},
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _lead(newest):
    if newest["published"]:
        return [f"{newest['name']}: published as version {newest['published']}."]
    return [
        f"{newest['name']}: not published, the model of before goes on serving. {'; '.join(newest['reasons'])}."
    ]


def _sections(results, domains):
    """Plots, with a title and a sentence."""
    text = "The newest held-out items by each day's own model, a cross where it was not published; dashed: the mean by the "
    found = [
        (
            f"{HEADLINE} day by day",
            text + "model that served until then.",
            _figures(results, domains),
        ),
        (
            "New items",
            "Items that the day's logs brought into each domain.",
            _new_items(results, domains),
        ),
        (
            "How far item vectors moved",
            "Mean cosine of an item's vector and the one before.",
            _moved(results, domains),
        ),
        ("Time", "Seconds of each stage.", _time(results)),
    ]
    return rendered(section for section in found if section[2] is not None)


def _figures(results, domains):
    figure, days = go.Figure(), _days(results)
    symbols = ["circle" if result["published"] else "x" for result in results]
    sizes = [7 if result["published"] else 12 for result in results]
    for domain in domains:
        values = [_of(result, domain.name, "candidate") for result in results]
        marker = {"size": sizes, "symbol": symbols}
        line = {"width": 2, **domain.line}
        figure.add_scatter(
            x=days,
            y=values,
            mode="lines+markers",
            name=domain.label,
            line=line,
            marker=marker,
        )
    for which, label, dash in (
        ("candidate", "mean", "solid"),
        ("current", "mean, until then", "dash"),
    ):
        means = [_mean(result, which) for result in results]
        if any(mean is not None for mean in means):
            line = {"width": 3.5, "color": "#1f2933", "dash": dash}
            figure.add_scatter(x=days, y=means, mode="lines", name=label, line=line)
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(rangemode="tozero", tickformat=".2f")
    return _by_day(figure, 420)


def _new_items(results, domains):
    figure = go.Figure()
    came = [result for result in results if result["extension"]]
    for domain in domains:
        values = [
            result["extension"]["domains"].get(domain.name, {}).get("new", 0)
            for result in came
        ]
        if any(values):
            pattern = {
                "shape": domain.hatch,
                "fgcolor": "white",
                "solidity": 0.25,
                "size": 6,
            }
            marker = {"color": domain.colour, "pattern": pattern}
            figure.add_bar(x=_days(came), y=values, name=domain.label, marker=marker)
    return _by_day(figure, 300, barmode="stack", showlegend=True)


def _moved(results, domains):
    figure = go.Figure()
    moved = [result for result in results if result["drift"]]
    for domain in domains:
        values = [result["drift"].get(domain.name, {}).get("mean") for result in moved]
        if any(value is not None for value in values):
            line = {"width": 2, **domain.line}
            figure.add_scatter(
                x=_days(moved),
                y=values,
                mode="lines+markers",
                name=domain.label,
                line=line,
            )
    figure.update_traces(yhoverformat=".3f", showlegend=True)
    return _by_day(figure, 300)


def _time(results):
    figure, days = go.Figure(), _days(results)
    stages = list(
        dict.fromkeys(stage for result in results for stage in result["seconds"])
    )
    for stage, style in zip(stages, plots.styles(stages), strict=True):
        figure.add_bar(
            x=days,
            y=[result["seconds"].get(stage, 0) for result in results],
            name=stage,
            marker_color=style.colour,
        )
    figure.update_traces(yhoverformat=",.0f")
    return _by_day(figure, 300, barmode="stack", showlegend=True)


def _days(results):
    """Their names as Plotly shows them letter by letter."""
    return [
        style.label for style in plots.styles([result["name"] for result in results])
    ]


def _by_day(figure, height, **layout):
    figure = plots.finished(figure, height, **layout)
    return (
        None
        if figure is None
        else figure.update_xaxes(title=None, type="category", tickformat=None)
    )


def _table(results):
    rows = []
    for result in reversed(results[-_SHOWN:]):
        candidate, current = _mean(result, "candidate"), _mean(result, "current")
        sense = "" if current is None else "better" if candidate >= current else "worse"
        extension = result["extension"] or {"arrived": None, "domains": {}}
        new = sum(own["new"] for own in extension["domains"].values())
        published = (
            Cell(f"version {result['published']}")
            if result["published"]
            else Cell("no", "worse")
        )
        arrived = "–" if extension["arrived"] is None else f"{extension['arrived']:,}"
        figures = [
            Cell(number(candidate), sense),
            Cell(number(current)),
            Cell(arrived),
            Cell(f"{new:,}"),
        ]
        rows.append(
            [
                Cell(printable(result["name"])),
                published,
                *figures,
                Cell(duration(sum(result["seconds"].values()))),
            ]
        )
    text = f"The newest first, {_SHOWN} at most. {HEADLINE} is the mean of the domains; each day's report.md says more."
    return Table(
        "Days",
        text,
        [
            "day",
            "published",
            HEADLINE,
            "the model until then",
            "rows",
            "new items",
            "time",
        ],
        rows,
    )


def _of(result, domain, which):
    return (result["domains"].get(domain) or {}).get(which)


def _mean(result, which):
    values = [
        figures[which]
        for figures in result["domains"].values()
        if figures[which] is not None
    ]
    return float(np.mean(values)) if values else None
