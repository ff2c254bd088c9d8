"""The report's plots: a Plotly figure from a run's records, or None where nothing is logged for it.

A domain has one colour in all of them (`styles`). Lines over the steps are thinned to MAX_POINTS.
Where they are noisy, a bold moving mean lies over the faint figures themselves.
"""

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trainer.evaluation.domain_weights import relative_weights
from trainer.evaluation.evaluation import Evaluation
from trainer.reporting.console import escape_name

MAX_POINTS = 2000
_SMOOTHING_SHARE = 0.03  # of the run
_FEW_POINTS = 60  # below it the points themselves are marked
_LONGEST_LABEL = 30
# The first six are Okabe and Ito's, the others darker ones of Tol's and Brewer's sets. From the
# seventh on a second sign is added (a dash, a hatching), as no twelve colours are told apart by
# everyone.
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DARKER = ("#332288", "#882255", "#999933", "#117733", "#8C510A", "#44AA99")
_COLOURS = (*_OKABE_ITO, *_DARKER)
_COLOURS_A_SIGN = 6
_DASHES = ("solid", "dash", "dot")
_HATCHES = ("", "/", "x")
_SVG_DASHES = ("none", "6 3", "2 2")
_BLUE = _COLOURS[0]
_ORANGE = _COLOURS[1]
_DARK = "#1f2933"
_GREY = "#8593a3"
_GRID = "#e9edf1"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_MARGIN = {
    "l": 64,
    "r": 16,
    "t": 16,
    "b": 48,
}
_SMALL_MARGIN = {
    "l": 48,
    "r": 16,
    "t": 40,
    "b": 40,
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How a domain looks.

    label: its name as Plotly shows it letter by letter. hatch: of its bars. svg_dash: of its line
    in the page's tables.
    """

    name: str
    label: str
    colour: str
    dash: str
    hatch: str
    svg_dash: str

    @property
    def line(self) -> dict[str, Any]:
        """Its line in a plot."""
        return {"color": self.colour, "dash": self.dash}


@dataclass(frozen=True)
class Panel:
    """One of the small plots side by side.

    fields: of the train record. form: of the axis. noisy: whether a moving mean is drawn.
    """

    title: str
    fields: tuple[str, ...]
    form: str
    noisy: bool = True


SPEED = (
    Panel("users per second", ("users_per_second",), "~s"),
    Panel("waiting for data", ("data_wait",), "~%"),
    Panel("memory, GB", ("memory_gb",), "~g", noisy=False),
)
OPTIMISATION = (
    Panel("learning rate", ("learning_rate",), "~g", noisy=False),
    Panel("gradient norm", ("gradient_norm",), "~g"),
    Panel(
        f"α and <span style='color:{_ORANGE}'>β</span>",
        ("alpha", "beta"),
        "~g",
        noisy=False,
    ),
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
        style = Style(
            name=name,
            label=html.escape(label),
            colour=_COLOURS[number % len(_COLOURS)],
            dash=_DASHES[sign],
            hatch=_HATCHES[sign],
            svg_dash=_SVG_DASHES[sign],
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


def loss_plot(train: list[Record]) -> go.Figure | None:
    """The loss and its parts."""
    figure = go.Figure()
    _draw(figure, train, "loss", "loss", {"color": _DARK, "width": 2.5})
    _draw(figure, train, "loss_single", "single-domain", {"color": _BLUE})
    _draw(figure, train, "loss_cross", "cross-domain", {"color": _ORANGE})
    dashed = {"color": _GREY, "dash": "dash"}
    _draw(figure, train, "mutual_information", "mutual information", dashed)
    figure.update_traces(yhoverformat=".4f")
    return finish_figure(figure, 380)


def weight_plot(train: list[Record], domains: list[Style]) -> go.Figure | None:
    """λ by domain."""
    figure = go.Figure()
    for domain in domains:
        _draw(
            figure,
            train,
            "lambda",
            domain.label,
            domain.line,
            domain=domain.name,
        )
    figure.update_traces(yhoverformat=".3f")
    figure.update_yaxes(rangemode="tozero")
    return finish_figure(figure, 420)


def gap_plot(train: list[Record], domains: list[Style]) -> go.Figure | None:
    """φ by domain, with a line at 0 and the side of negative transfer shaded."""
    figure = go.Figure()
    for domain in domains:
        _draw(
            figure, train, "phi", domain.label, domain.line, domain=domain.name
        )
    if not figure.data:
        return None
    figure.update_traces(yhoverformat="+.3f")
    low, high = _range_with_zero(figure)
    figure.update_yaxes(range=[low, high], tickformat=".2~f")
    figure.add_hrect(
        y0=low,
        y1=0,
        fillcolor=_ORANGE,
        opacity=0.06,
        line_width=0,
        layer="below",
    )
    figure.add_hline(y=0, line={"color": _DARK, "width": 1.5})
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
    return finish_figure(figure, 420)


def pairs_plot(train: list[Record], domains: list[Style]) -> go.Figure | None:
    """A small plot for each domain: its single-domain loss grey, its cross-domain loss coloured."""
    drawn = []
    for domain in domains:
        values = series(train, "cross_by_domain", domain.name)
        if np.isfinite(values).any():
            drawn.append(domain)
    if not drawn:
        return None
    columns = min(len(drawn), 4)
    if len(drawn) in (5, 6):
        columns = 3
    rows = -(-len(drawn) // columns)
    height = 90 + 210 * rows
    titles = [domain.label for domain in drawn]
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=titles,
        vertical_spacing=60 / height,
        horizontal_spacing=0.05,
    )
    for number, domain in enumerate(drawn):
        options = {
            "row": number // columns + 1,
            "col": number % columns + 1,
            "domain": domain.name,
            "faint": False,
        }
        grey = {"color": _GREY}
        coloured = {"color": domain.colour}
        _draw(figure, train, "single_by_domain", "single", grey, **options)
        _draw(figure, train, "cross_by_domain", "cross", coloured, **options)
    figure.update_traces(yhoverformat=".3f")
    figure.update_yaxes(nticks=5)
    return _finish_panels(figure, height)


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
        if _any_value(values):
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines+markers",
                name=domain.label,
                line={"width": 2, **domain.line},
                marker={"size": 6},
            )
    if not figure.data:
        return None
    if len(domains) > 1:
        means = [evaluation.mean_ndcg for evaluation in evaluations]
        figure.add_scatter(
            x=steps,
            y=means,
            mode="lines+markers",
            name="mean",
            line={"color": _DARK, "width": 3.5},
            marker={"size": 8},
        )
    upright = {
        "color": _GREY,
        "dash": "dot",
        "width": 1.5,
    }
    figure.add_vline(x=best["step"], line=upright)
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(rangemode="tozero", tickformat=".2f")
    return finish_figure(figure, 420)


def metrics_plot(
    record: Record | None, domains: list[Style]
) -> go.Figure | None:
    """Bars of an evaluation record: a group for each metric, a bar for each domain and the mean."""
    if record is None:
        return None
    evaluation = Evaluation.from_record(record)
    metrics = evaluation.metrics
    figure = go.Figure()
    for domain in domains:
        figures = evaluation.figures_of(domain.name).model
        values = [figures.get(metric) for metric in metrics]
        if _any_value(values):
            figure.add_bar(
                x=metrics,
                y=values,
                name=domain.label,
                marker=_bar_marker(domain),
            )
    if not figure.data:
        return None
    if len(domains) > 1:
        means = [evaluation.mean.get(metric) for metric in metrics]
        figure.add_bar(
            x=metrics,
            y=means,
            name="mean",
            marker_color=_DARK,
        )
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(tickformat=".2f")
    finish_figure(
        figure,
        400,
        bargap=0.25,
        bargroupgap=0.08,
    )
    return figure.update_xaxes(
        title=None,
        tickformat=None,
        showgrid=False,
    )


def _bar_marker(domain: Style) -> dict[str, Any]:
    """The colour and the hatching of a domain's bars, as Plotly takes them."""
    pattern = {
        "shape": domain.hatch,
        "fgcolor": "white",
        "solidity": 0.25,
        "size": 6,
    }
    return {"color": domain.colour, "pattern": pattern}


def _any_value(values: list[float | None]) -> bool:
    return any(value is not None for value in values)


def gates_plot(gates: dict[str, Any]) -> go.Figure | None:
    """A heatmap: mean weights (rows: domains of both views) of the experts (columns).

    gates: as an inspection has them (trainer/evaluation/inspect.py), here of two experts:

        {"cross": {"Books": [0.8, 0.2], "Toys": [0.4, 0.6]}, "single": {"Books": [0.5, 0.5]}}
    """
    labels = {"cross": "cross-domain gate: {}", "single": "{}, its own gate"}
    rows = []
    cells = []
    for view, label in labels.items():
        by_domain = gates.get(view) or {}
        for name, weights in by_domain.items():
            (style,) = assign_styles([name])
            rows.append(label.format(style.label))
            cells.append(weights)
    if not cells:
        return None
    experts = []
    for index in range(len(cells[0])):
        experts.append(f"expert {index + 1}")
    greatest = max(max(weights) for weights in cells)
    # Even weights are half as dark as can be.
    twice_even = 2 / len(experts)
    heatmap = go.Heatmap(
        z=cells,
        x=experts,
        y=rows,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}",
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        colorscale=[[0, "#ffffff"], [1, _BLUE]],
        zmin=0,
        zmax=max(twice_even, greatest),
        showscale=False,
    )
    figure = go.Figure(heatmap)
    finish_figure(figure, 120 + 34 * len(rows), hovermode="closest")
    figure.update_xaxes(
        title=None,
        tickformat=None,
        side="top",
    )
    return figure.update_yaxes(autorange="reversed")


def final_weights_plot(
    weights: dict[str, float], domains: list[Style]
) -> go.Figure | None:
    """λ of each domain, with a line at equal weights, which are 1."""
    weights = relative_weights(
        weights
    )  # earlier versions recorded another scale
    shown = [domain for domain in domains if domain.name in weights]
    if not shown:
        return None
    colours = []
    hatches = []
    shown_weights = []
    labels = []
    for domain in shown:
        colours.append(domain.colour)
        hatches.append(domain.hatch)
        shown_weights.append(weights[domain.name])
        labels.append(domain.label)
    marker = {
        "color": colours,
        "pattern": {"shape": hatches},
    }
    bars = go.Bar(
        x=shown_weights,
        y=labels,
        orientation="h",
        marker=marker,
        texttemplate="%{x:.3f}",
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )
    figure = go.Figure(bars)
    finish_figure(figure, 90 + 34 * len(shown), hovermode="closest")
    upright = {
        "color": _DARK,
        "width": 1.5,
        "dash": "dot",
    }
    figure.add_vline(x=1, line=upright)
    figure.update_xaxes(
        title=None,
        rangemode="tozero",
        tickformat=".2~f",
    )
    return figure.update_yaxes(autorange="reversed")


def panels_plot(
    train: list[Record], panels: tuple[Panel, ...]
) -> go.Figure | None:
    """Small plots side by side."""
    titles = [panel.title for panel in panels]
    figure = make_subplots(1, len(panels), subplot_titles=titles)
    for column, panel in enumerate(panels, start=1):
        options = {
            "row": 1,
            "col": column,
            "smooth": panel.noisy,
        }
        for field, colour in zip(panel.fields, (_DARK, _ORANGE), strict=False):
            _draw(figure, train, field, field, {"color": colour}, **options)
        figure.update_yaxes(
            tickformat=panel.form,
            rangemode="tozero",
            row=1,
            col=column,
        )
    return _finish_panels(figure, 300)


def thin(
    steps: np.ndarray, values: np.ndarray, points: int = MAX_POINTS
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


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """The centred moving mean over a share of the run; the values themselves if there are few.

    It passes over gaps and is narrower at both ends. Of a width of three:

        values         1.0  3.0  NaN  5.0
        moving mean    2.0  2.0  NaN  5.0
    """
    width = round(len(values) * _SMOOTHING_SHARE)
    if width < 3:
        return values
    finite = np.isfinite(values)
    kernel = np.ones(width)
    counts = np.convolve(finite, kernel, mode="same")
    filled = np.where(finite, values, 0.0)
    sums = np.convolve(filled, kernel, mode="same")
    means = sums / np.maximum(counts, 1)
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
    **panel: int,
) -> None:
    """Draws a field of the records over the steps, where any record has it.

    label: in the legend; the faint line shares it, so that one click hides both. line: its colour,
    dash and width. domain: which of a field that has a figure for each domain. smooth: as a moving
    mean. faint: the figures themselves too, below it. panel: `row` and `col` of a small plot.
    """
    values = series(records, field, domain)
    if not np.isfinite(values).any():
        return
    logged_steps = [record["step"] for record in records]
    steps = np.array(logged_steps, dtype=np.int64)
    steps, values = thin(steps, values)
    bold = _moving_mean(values) if smooth else values
    common = {
        "x": steps.astype(np.int32),
        "connectgaps": True,
        "legendgroup": label,
        **panel,
    }
    if faint and bold is not values:
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


def _range_with_zero(figure: go.Figure) -> tuple[float, float]:
    """The range of an axis on which 0 and all lines are in view, with a margin.

    Lines from −0.5 to 1.5 give −0.62 to 1.62.
    """
    lowest, highest = _range(figure)
    low = min(lowest, -0.1 * abs(highest))
    high = max(highest, 0.1 * abs(lowest))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


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
    figure: go.Figure, height: int, **layout: Any
) -> go.Figure | None:
    """The figure in the report's look, or None where nothing is drawn in it."""
    if not figure.data:
        return None
    defaults = {
        "margin": _MARGIN,
        "hovermode": "x unified",
    }
    options = defaults | layout
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={
            "family": _FONT,
            "size": 13,
            "color": _DARK,
        },
        hoverlabel={"namelength": -1},
        **options,
    )
    figure.update_layout(legend_tracegroupgap=0)
    title = {
        "text": "step",
        "font": {"size": 13},
        "standoff": 8,
    }
    figure.update_xaxes(
        gridcolor=_GRID,
        zeroline=False,
        tickformat=",d",
        exponentformat="none",
        title=title,
    )
    return figure.update_yaxes(
        gridcolor=_GRID,
        zeroline=False,
        automargin=True,
    )


def _finish_panels(figure: go.Figure, height: int) -> go.Figure | None:
    """`finished` for small plots: narrow margins, no legend, few ticks."""
    if (
        finish_figure(
            figure,
            height,
            margin=_SMALL_MARGIN,
            showlegend=False,
        )
        is None
    ):
        return None
    figure.update_annotations(font={"size": 13, "color": _DARK})
    return figure.update_xaxes(
        title=None,
        nticks=5,
        tickformat="~s",
    )
