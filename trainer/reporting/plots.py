"""The report's plots: a Plotly figure from a run's records, or None where nothing is logged for it.

A domain has one colour in all of them (`assign_styles`). Lines over the steps are thinned, so that a
plot has MAX_POINTS in all, whatever the number of domains. Where they are noisy, a bold moving mean
lies over the faint figures themselves. A line needs two points: there is no plot of one dot.

Figures are in the colours of a light page (trainer/reporting/colours.py).
"""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from trainer.evaluation.domain_weights import relative_weights
from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.colours import (
    DARK_DOMAINS,
    DOMAINS,
    GREY,
    GRID,
    INK,
    PAPER,
)
from trainer.reporting.console import escape_name, format_number
from trainer.reporting.html import Chart
from trainer.run_files import HEADLINE

MAX_POINTS = 6000  # of a plot, over all of its lines
_MOST_POINTS = 1000  # of a line
_SMOOTHING_SHARE = 0.03  # of the run
_FEW_POINTS = 60  # below it the points themselves are marked
_LONGEST_LABEL = 30
_COLOURS_A_SIGN = 6
_DASHES = ("solid", "dash", "dot")
_HATCHES = ("", "/", "x")
_SVG_DASHES = ("none", "6 3", "2 2")
_BLUE = DOMAINS[0]
_ORANGE = DOMAINS[1]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_MARGIN = {
    "l": 64,
    "r": 16,
    "t": 16,
    "b": 48,
}
_SMALL_MARGIN = {
    "l": 52,
    "r": 12,
    "t": 10,
    "b": 36,
}
_FEW_STEPS = 8  # a tick for each of them

Record = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a domain looks.

    label: its name as Plotly shows it letter by letter. hatch: of its bars. dark_colour: on a dark
    page. svg_dash: of its line in the page's tables.
    """

    name: str
    label: str
    colour: str
    dash: str
    hatch: str
    svg_dash: str
    dark_colour: str

    @property
    def line(self) -> dict[str, Any]:
        """Its line in a plot."""
        return {"color": self.colour, "dash": self.dash}


@dataclass(frozen=True)
class Panel:
    """One of the small plots side by side.

    fields: of the train record, with a name where there are several. form: of the axis. noisy:
    whether a moving mean is drawn.
    """

    title: str
    fields: dict[str, str]
    form: str
    noisy: bool = True


SPEED = (
    Panel("users per second", {"users_per_second": ""}, "~s"),
    Panel("share of the time waiting for data", {"data_wait": ""}, "~%"),
    Panel("memory, GB", {"memory_gb": ""}, "~g", noisy=False),
)
OPTIMISATION = (
    Panel("gradient norm", {"gradient_norm": ""}, "~g"),
    Panel("learning rate", {"learning_rate": ""}, "~g", noisy=False),
    Panel("α and β", {"alpha": "α", "beta": "β"}, "~g", noisy=False),
)


def assign_styles(names: list[str]) -> list[Style]:
    """A style for each domain, by its index in the list.

        index      0             1 … 5         6               … 11        12
        colour     blue          …             dark blue       …           blue
        line       solid         solid         dashed          dashed      dotted

    A name that is longer than a legend is cut, and an ellipsis says so.
    """
    domains = []
    for number, name in enumerate(names):
        label = escape_name(name)
        if len(label) > _LONGEST_LABEL:
            label = label[: _LONGEST_LABEL - 1] + "…"
        sign = min(number // _COLOURS_A_SIGN, len(_DASHES) - 1)
        colour = DOMAINS[number % len(DOMAINS)]
        style = Style(
            name=name,
            label=html.escape(label),
            colour=colour,
            dash=_DASHES[sign],
            hatch=_HATCHES[sign],
            svg_dash=_SVG_DASHES[sign],
            dark_colour=DARK_DOMAINS.get(colour, colour),
        )
        domains.append(style)
    return domains


def series(
    records: list[Record], field: str, domain: str | None = None
) -> np.ndarray:
    """A field of all records, float64 (records,), NaN where it is missing.

    domain: which of a field that has a figure for each domain. Of two records,

        {"step": 10, "loss": 2.5, "phi": {"Books": 0.1, "Toys": null}}
        {"step": 20, "loss": null, "phi": {"Books": 0.2}}

    the series of "loss" is [2.5, NaN], and that of "phi" in Books is [0.1, 0.2].
    """
    values_N = np.full(len(records), np.nan)
    for index, record in enumerate(records):
        value = record.get(field)
        if domain is not None:
            value = (value or {}).get(domain)
        if value is not None:
            values_N[index] = value
    return values_N


def with_relative_weights(train: list[Record]) -> list[Record]:
    """The records with λ on one scale, 1 for all alike, whichever version logged them."""
    relative = []
    for record in train:
        weights = relative_weights(record.get("lambda"))
        relative.append(record | {"lambda": weights})
    return relative


def loss_plot(train: list[Record]) -> go.Figure | None:
    """The loss and its two parts by view."""
    figure = go.Figure()
    _draw(figure, train, "loss", "loss", {"color": INK, "width": 2.5})
    _draw(figure, train, "loss_single", "single-domain", {"color": _BLUE})
    _draw(figure, train, "loss_cross", "cross-domain", {"color": _ORANGE})
    figure.update_traces(yhoverformat=".4f")
    return finish_figure(figure, 380, "loss")


def information_plot(train: list[Record]) -> go.Figure | None:
    """The mutual-information loss; None where it is 0 throughout: the run has none."""
    field = "mutual_information"
    if not np.nan_to_num(series(train, field)).any():
        return None
    figure = go.Figure()
    _draw(figure, train, field, "mutual information", {"color": INK})
    figure.update_traces(yhoverformat=".4f", showlegend=False)
    return finish_figure(figure, 260, "mutual-information loss")


def weight_plot(train: list[Record], domains: list[Style]) -> go.Figure | None:
    """λ by domain, with a line at 1, where all domains weigh alike."""
    figure = go.Figure()
    train = with_relative_weights(train)
    for domain in domains:
        _draw(
            figure,
            train,
            "lambda",
            domain.label,
            domain.line,
            domain=domain.name,
            lines=len(domains),
        )
    if not figure.data:
        return None
    figure.update_traces(yhoverformat=".3f")
    low, high = _range_with(figure, 1.0)
    figure.update_yaxes(range=[low, high], tickformat="~f")
    even = {"color": INK, "width": 1.5, "dash": "dot"}
    figure.add_hline(y=1, line=even)
    return finish_figure(figure, 420, "λ (1: all alike)")


def gap_plot(train: list[Record], domains: list[Style]) -> go.Figure | None:
    """φ by domain, with a line at 0 and the side of negative transfer shaded."""
    figure = go.Figure()
    for domain in domains:
        _draw(
            figure,
            train,
            "phi",
            domain.label,
            domain.line,
            domain=domain.name,
            lines=len(domains),
        )
    if not figure.data:
        return None
    figure.update_traces(yhoverformat="+.3f")
    low, high = _range_with(figure, 0.0)
    figure.update_yaxes(range=[low, high], tickformat=".2~f")
    figure.add_hrect(
        y0=low,
        y1=0,
        fillcolor=_ORANGE,
        opacity=0.06,
        line_width=0,
        layer="below",
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    figure.add_annotation(
        text="negative transfer",
        showarrow=False,
        font={"size": 12},
        x=1,
        xref="paper",
        xanchor="right",
        y=low,
        yanchor="bottom",
    )
    return finish_figure(figure, 420, "φ")


def pairs_plot(train: list[Record], domains: list[Style]) -> list[Chart]:
    """A small plot for each domain: its single-domain loss grey, its cross-domain loss coloured."""
    charts = []
    for domain in domains:
        figure = go.Figure()
        lines = (
            ("single_by_domain", "single", GREY),
            ("cross_by_domain", "cross", domain.colour),
        )
        for field, label, colour in lines:
            _draw(
                figure,
                train,
                field,
                label,
                {"color": colour},
                domain=domain.name,
                faint=False,
                lines=2 * len(domains),
            )
        if not figure.data:
            continue
        figure.update_traces(yhoverformat=".3f")
        figure.update_yaxes(nticks=5)
        _finish_small(figure)
        charts.append(Chart(figure, escape_name(domain.name)))
    return charts


def validation_plot(
    validations: list[Record], best: Record | None, domains: list[Style]
) -> go.Figure | None:
    """The headline metric by domain and its mean over the steps, with an upright at the best."""
    figure = go.Figure()
    evaluations = [Evaluation.from_record(record) for record in validations]
    steps = [evaluation.step for evaluation in evaluations]
    for domain in domains:
        values = []
        for evaluation in evaluations:
            figures = evaluation.figures_of(domain.name)
            values.append(figures.headline)
        if _is_line(values):
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines+markers",
                name=domain.label,
                line={"width": 2, **domain.line},
                marker={"size": 6},
            )
    if best is None or not figure.data:
        return None
    if len(domains) > 1:
        means = [evaluation.mean_ndcg for evaluation in evaluations]
        figure.add_scatter(
            x=steps,
            y=means,
            mode="lines+markers",
            name="mean",
            line={"color": INK, "width": 3.5},
            marker={"size": 8},
        )
    upright = {
        "color": GREY,
        "dash": "dot",
        "width": 1.5,
    }
    figure.add_vline(x=best["step"], line=upright)
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(tickformat=".3~f")
    return finish_figure(figure, 420, HEADLINE)


def bar_marker(domain: Style) -> dict[str, Any]:
    """The colour and the hatching of a domain's bars, as Plotly takes them."""
    pattern = {
        "shape": domain.hatch,
        "fgcolor": PAPER,
        "solidity": 0.25,
        "size": 6,
    }
    return {"color": domain.colour, "pattern": pattern}


def _is_line(values: list[float | None]) -> bool:
    """Whether there are two points at least."""
    points = [value for value in values if value is not None]
    return len(points) > 1


def panels_plot(
    train: list[Record], panels: tuple[Panel, ...]
) -> tuple[list[Chart], list[str]]:
    """Small plots side by side, and in words what has not changed: "learning rate 0.001"."""
    charts = []
    flat = []
    for panel in panels:
        if _is_flat(train, panel):
            flat += _name_levels(train, panel)
            continue
        figure = go.Figure()
        colours = (INK, _ORANGE)
        for (field, name), colour in zip(
            panel.fields.items(), colours, strict=False
        ):
            line = {"color": colour}
            label = name or panel.title
            _draw(figure, train, field, label, line, smooth=panel.noisy)
        if not figure.data:
            continue
        figure.update_yaxes(tickformat=panel.form, rangemode="tozero")
        _finish_small(figure, has_legend=len(panel.fields) > 1)
        charts.append(Chart(figure, panel.title))
    return charts, flat


def _is_flat(train: list[Record], panel: Panel) -> bool:
    """Whether all of a panel's lines are level."""
    for field in panel.fields:
        values = series(train, field)
        values = values[np.isfinite(values)]
        if len(values) < 2 or np.ptp(values) > 1e-9 * abs(values).max():
            return False
    return True


def _name_levels(train: list[Record], panel: Panel) -> list[str]:
    """The figures of level lines: ["α 1", "β 1"]."""
    levels = []
    for field, name in panel.fields.items():
        values = series(train, field)
        level = float(np.nanmax(values))
        levels.append(f"{name or panel.title} {format_number(level, '.4g')}")
    return levels


def points_per_line(lines: int = 1) -> int:
    """How many points a line has at most in a plot of so many."""
    share = MAX_POINTS // max(1, lines)
    return max(2, min(_MOST_POINTS, share))


def thin(
    steps: np.ndarray, values: np.ndarray, points: int = _MOST_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Means over groups of neighbouring lines, equal in length, of which at most `points` are left.

    steps: int64 (N,). values: float64 (N,), NaN where missing, which means pass over. A group's
    step is its last line's. Five lines thinned to three points:

        steps     10   20      30   40      50
        values    1.0  3.0     NaN  5.0     7.0
        thinned       (20, 2.0)    (40, 5.0)   (50, 7.0)
    """
    size = -(-len(steps) // points)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    lasts = np.minimum(starts + size, len(steps)) - 1
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return steps[lasts], means


def _moving_mean(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The centred moving mean over a share of the run's steps.

    It passes over gaps and is narrower at both ends. Of a window of 2 steps to both sides:

        steps          1    2    3    4    50    100
        values         1.0  3.0  NaN  5.0  7.0   9.0
        moving mean    2.0  3.0  NaN  4.0  7.0   9.0
    """
    reach = _SMOOTHING_SHARE / 2 * (steps[-1] - steps[0])
    finite = np.isfinite(values)
    counts = np.concatenate([[0], np.cumsum(finite)])
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0.0))])
    begins = np.searchsorted(steps, steps - reach, side="left")
    ends = np.searchsorted(steps, steps + reach, side="right")
    inside = counts[ends] - counts[begins]
    means = (sums[ends] - sums[begins]) / np.maximum(inside, 1)
    return np.where(finite, means, np.nan)


def _draw(
    figure: go.Figure,
    records: list[Record],
    field: str,
    label: str,
    line: dict[str, Any],
    domain: str | None = None,
    smooth: bool = True,
    faint: bool = True,
    lines: int = 1,
) -> None:
    """Draws a field of the records over the steps, where two records have it.

    label: in the legend; the faint line shares it, so that one click hides both. line: its colour,
    dash and width. domain: which of a field that has a figure for each domain. smooth: as a moving
    mean. faint: the figures themselves too, below it. lines: how many the plot has in all.
    """
    values = series(records, field, domain)
    if np.isfinite(values).sum() < 2:
        return
    logged_steps = [record["step"] for record in records]
    steps = np.array(logged_steps, dtype=np.int64)
    steps, values = thin(steps, values, points_per_line(lines))
    bold = _moving_mean(steps, values) if smooth else values
    common = {
        "x": steps.astype(np.int32),
        "connectgaps": True,
        "legendgroup": label,
    }
    is_smoothed = not np.allclose(bold, values, equal_nan=True)
    if faint and is_smoothed:
        figure.add_scatter(
            y=values.astype(np.float32),
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            opacity=0.2,
            line={"color": line["color"], "width": 1},
            **common,
        )
    mode = "lines" if len(steps) > _FEW_POINTS else "lines+markers"
    figure.add_scatter(
        y=bold.astype(np.float32),
        name=label,
        marker={"size": 5},
        showlegend=True,
        mode=mode,
        line={"width": 2, **line},
        **common,
    )


def _range_with(figure: go.Figure, level: float) -> tuple[float, float]:
    """The range of an axis on which a level and all lines are in view, with a margin.

    Around 0, lines from −0.5 to 1.5 give −0.62 to 1.62.
    """
    lowest, highest = _range(figure)
    below = lowest - level
    above = highest - level
    low = min(below, -0.1 * abs(above))
    high = max(above, 0.1 * abs(below))
    margin = 0.06 * (high - low) or 0.1
    return level + low - margin, level + high + margin


def _range(figure: go.Figure) -> tuple[float, float]:
    """The lowest and highest of the lines.

    Of faint lines the outermost hundredths do not count: one spike flattens nothing. One line, and
    the faint one below it with a spike:

        bold     −0.2 … 0.9
        faint    −0.5 … 1.5, and once 40
        range    −0.5 … 1.5
    """
    lows = []
    highs = []
    for trace in figure.data:
        edge = 1 if trace.opacity else 0
        values = np.asarray(trace.y)
        values = values[np.isfinite(trace.y)]
        lows.append(np.percentile(values, edge))
        highs.append(np.percentile(values, 100 - edge))
    return float(min(lows)), float(max(highs))


def finish_figure(
    figure: go.Figure, height: int, y_title: str | None = None, **layout: Any
) -> go.Figure | None:
    """The figure in the report's look, or None where nothing is drawn in it."""
    if not figure.data:
        return None
    defaults = {
        "margin": _MARGIN,
        "hovermode": "x unified",
        "legend": {"tracegroupgap": 0},
    }
    options = defaults | layout
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        font={
            "family": _FONT,
            "size": 13,
            "color": INK,
        },
        hoverlabel={"namelength": -1, "bgcolor": PAPER},
        **options,
    )
    figure.update_xaxes(
        gridcolor=GRID,
        zeroline=False,
        exponentformat="none",
        title=_axis_title("step"),
        **_step_ticks(figure),
    )
    return figure.update_yaxes(
        gridcolor=GRID,
        zeroline=False,
        automargin=True,
        title=_axis_title(y_title),
    )


def _axis_title(text: str | None) -> dict[str, Any]:
    return {
        "text": text,
        "font": {"size": 13},
        "standoff": 8,
    }


def _step_ticks(figure: go.Figure) -> dict[str, Any]:
    """Ticks at whole steps, no two of them alike: every step where there are few."""
    lowest = np.inf
    highest = -np.inf
    for trace in figure.data:
        steps = np.asarray(trace.x)
        if steps.dtype.kind in "iuf" and len(steps):
            lowest = min(lowest, steps.min())
            highest = max(highest, steps.max())
    ticks: dict[str, Any] = {"tickformat": ",~f"}
    if highest - lowest <= _FEW_STEPS:
        ticks |= {"tick0": 0, "dtick": 1}
    elif np.isfinite(highest):
        ticks["nticks"] = _FEW_STEPS + 1
    return ticks


def _finish_small(figure: go.Figure, has_legend: bool = False) -> None:
    """`finish_figure` for small plots: narrow margins, few ticks."""
    legend = {
        "orientation": "h",
        "x": 0,
        "y": 1,
        "yanchor": "bottom",
        "tracegroupgap": 0,
    }
    finish_figure(
        figure, 220, margin=_SMALL_MARGIN, showlegend=has_legend, legend=legend
    )
    figure.update_xaxes(title=None, tickformat="~s")
    if figure.layout.xaxis.nticks:
        figure.update_xaxes(nticks=5)
