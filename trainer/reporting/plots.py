"""The report's plots: a Plotly figure from a run's records, or None where the run has logged nothing for it.

A domain has one colour in all of them (`styles`). Lines over the steps are thinned to MAX_POINTS; where they are noisy, a bold
moving mean lies over the faint figures themselves.
"""

import html
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trainer.reporting.run_log import HEADLINE, metrics_of, printable

MAX_POINTS = 2000
_SMOOTHING_SHARE = 0.03  # of the run
_FEW_POINTS = 60  # below it the points themselves are marked
# The first six are Okabe and Ito's, the others darker ones of Tol's and Brewer's sets. From the seventh on a second sign is
# added (a dash, a hatching), as no twelve colours are told apart by everyone.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#332288", "#882255", "#999933", "#117733", "#8C510A", "#44AA99"),
)
_DASHES, _HATCHES, _SVG_DASHES = (
    ("solid", "dash", "dot"),
    ("", "/", "x"),
    ("none", "6 3", "2 2"),
)
_DARK, _GREY, _GRID = "#1f2933", "#8593a3", "#e9edf1"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_SMALL_MARGIN = {"l": 48, "r": 16, "t": 40, "b": 40}


@dataclass(frozen=True)
class Style:
    """How a domain looks: `label` is its name as Plotly shows it letter by letter, `hatch` its bars, `svg_dash` the page's."""

    name: str
    label: str
    colour: str
    dash: str
    hatch: str
    svg_dash: str

    @property
    def line(self):
        return {"color": self.colour, "dash": self.dash}


@dataclass(frozen=True)
class Panel:
    """One of the small plots side by side: fields of the train record, an axis format, whether the figures are noisy."""

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
        f"α and <span style='color:{_COLOURS[1]}'>β</span>",
        ("alpha", "beta"),
        "~g",
        noisy=False,
    ),
)


def styles(names: list[str]) -> list[Style]:
    """A style per domain, by its place in the list."""
    found = []
    for number, name in enumerate(names):
        label = printable(name)
        label = html.escape(label if len(label) <= 30 else label[:29] + "…")
        second = min(number // 6, 2)
        colour = _COLOURS[number % len(_COLOURS)]
        found.append(
            Style(
                name,
                label,
                colour,
                _DASHES[second],
                _HATCHES[second],
                _SVG_DASHES[second],
            )
        )
    return found


def series(records: list[dict], field: str, domain: str | None = None) -> np.ndarray:
    """A field of all records, of one domain where it is kept by domain: float64 (records,), NaN where it is missing."""
    values = (
        record.get(field) if domain is None else (record.get(field) or {}).get(domain)
        for record in records
    )
    return np.array(
        [np.nan if value is None else value for value in values], dtype=np.float64
    )


def loss_plot(train: list[dict]) -> go.Figure | None:
    figure = go.Figure()
    _draw(figure, train, "loss", "loss", {"color": _DARK, "width": 2.5})
    _draw(figure, train, "loss_single", "single-domain", {"color": _COLOURS[0]})
    _draw(figure, train, "loss_cross", "cross-domain", {"color": _COLOURS[1]})
    _draw(
        figure,
        train,
        "mutual_information",
        "mutual information",
        {"color": _GREY, "dash": "dash"},
    )
    figure.update_traces(yhoverformat=".4f")
    return finished(figure, 380)


def weight_plot(train: list[dict], domains: list[Style]) -> go.Figure | None:
    """λ by domain."""
    figure = go.Figure()
    for domain in domains:
        _draw(figure, train, "lambda", domain.label, domain.line, domain=domain.name)
    figure.update_traces(yhoverformat=".3f")
    figure.update_yaxes(rangemode="tozero")
    return finished(figure, 420)


def gap_plot(train: list[dict], domains: list[Style]) -> go.Figure | None:
    """φ by domain, with a line at 0 and the side of negative transfer shaded."""
    figure = go.Figure()
    for domain in domains:
        _draw(figure, train, "phi", domain.label, domain.line, domain=domain.name)
    if not figure.data:
        return None
    figure.update_traces(yhoverformat="+.3f")
    low, high = _range(figure)
    low, high = min(low, -0.1 * abs(high)), max(high, 0.1 * abs(low))
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin
    figure.update_yaxes(range=[low, high], tickformat=".2~f")
    figure.add_hrect(
        y0=low, y1=0, fillcolor=_COLOURS[1], opacity=0.06, line_width=0, layer="below"
    )
    figure.add_hline(y=0, line={"color": _DARK, "width": 1.5})
    corner = {
        "x": 1,
        "xref": "paper",
        "xanchor": "right",
        "y": low,
        "yanchor": "bottom",
    }
    figure.add_annotation(
        text="negative transfer", showarrow=False, font={"size": 12}, **corner
    )
    return finished(figure, 420)


def pairs_plot(train: list[dict], domains: list[Style]) -> go.Figure | None:
    """A small plot per domain: its single-domain loss in grey, its cross-domain loss in its colour."""
    drawn = [
        domain
        for domain in domains
        if np.isfinite(series(train, "cross_by_domain", domain.name)).any()
    ]
    if not drawn:
        return None
    columns = 3 if len(drawn) in (5, 6) else min(len(drawn), 4)
    rows = -(-len(drawn) // columns)
    height = 90 + 210 * rows
    spacing = {"vertical_spacing": 60 / height, "horizontal_spacing": 0.05}
    figure = make_subplots(
        rows, columns, subplot_titles=[domain.label for domain in drawn], **spacing
    )
    for number, domain in enumerate(drawn):
        place = {
            "row": number // columns + 1,
            "col": number % columns + 1,
            "domain": domain.name,
            "faint": False,
        }
        _draw(figure, train, "single_by_domain", "single", {"color": _GREY}, **place)
        _draw(
            figure, train, "cross_by_domain", "cross", {"color": domain.colour}, **place
        )
    figure.update_traces(yhoverformat=".3f")
    figure.update_yaxes(nticks=5)
    return _finish_panels(figure, height)


def validation_plot(
    validations: list[dict], best: dict | None, domains: list[Style]
) -> go.Figure | None:
    """The headline metric by domain and its mean over the steps, with an upright at the best."""
    figure = go.Figure()
    steps = [record["step"] for record in validations]
    for domain in domains:
        values = [
            (record["domains"].get(domain.name) or {}).get(HEADLINE)
            for record in validations
        ]
        if any(value is not None for value in values):
            marker, line = {"size": 6}, {"width": 2, **domain.line}
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines+markers",
                name=domain.label,
                line=line,
                marker=marker,
            )
    if not figure.data:
        return None
    if len(domains) > 1:
        means = [record["mean"].get(HEADLINE) for record in validations]
        marker, line = {"size": 8}, {"color": _DARK, "width": 3.5}
        figure.add_scatter(
            x=steps,
            y=means,
            mode="lines+markers",
            name="mean",
            line=line,
            marker=marker,
        )
    figure.add_vline(x=best["step"], line={"color": _GREY, "dash": "dot", "width": 1.5})
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(rangemode="tozero", tickformat=".2f")
    return finished(figure, 420)


def metrics_plot(record: dict | None, domains: list[Style]) -> go.Figure | None:
    """Bars of an evaluation record: a group per metric, in it a bar per domain and one for the mean."""
    if record is None:
        return None
    metrics = metrics_of(record)
    figure = go.Figure()
    for domain in domains:
        values = [
            (record["domains"].get(domain.name) or {}).get(metric) for metric in metrics
        ]
        if any(value is not None for value in values):
            pattern = {
                "shape": domain.hatch,
                "fgcolor": "white",
                "solidity": 0.25,
                "size": 6,
            }
            figure.add_bar(
                x=metrics,
                y=values,
                name=domain.label,
                marker={"color": domain.colour, "pattern": pattern},
            )
    if not figure.data:
        return None
    if len(domains) > 1:
        means = [record["mean"].get(metric) for metric in metrics]
        figure.add_bar(x=metrics, y=means, name="mean", marker_color=_DARK)
    figure.update_traces(yhoverformat=".4f", showlegend=True)
    figure.update_yaxes(tickformat=".2f")
    finished(figure, 400, bargap=0.25, bargroupgap=0.08)
    return figure.update_xaxes(title=None, tickformat=None, showgrid=False)


def gates_plot(gates: dict) -> go.Figure | None:
    """Mean weights (rows: domains of both views) of the experts (columns)."""
    rows, cells = [], []
    for view, label in (
        ("cross", "cross-domain gate: {}"),
        ("single", "{}, its own gate"),
    ):
        for name, weights in (gates.get(view) or {}).items():
            rows.append(label.format(styles([name])[0].label))
            cells.append(weights)
    if not cells:
        return None
    experts = [f"expert {number}" for number in range(1, len(cells[0]) + 1)]
    most = max(
        2 / len(experts), *map(max, cells)
    )  # even weights are half as dark as can be
    scale = {
        "colorscale": [[0, "#ffffff"], [1, _COLOURS[0]]],
        "zmin": 0,
        "zmax": most,
        "showscale": False,
    }
    texts = {
        "texttemplate": "%{z:.2f}",
        "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>",
    }
    figure = go.Figure(
        go.Heatmap(z=cells, x=experts, y=rows, xgap=2, ygap=2, **texts, **scale)
    )
    finished(figure, 120 + 34 * len(rows), hovermode="closest")
    figure.update_xaxes(title=None, tickformat=None, side="top")
    return figure.update_yaxes(autorange="reversed")


def final_weights_plot(weights: dict, domains: list[Style]) -> go.Figure | None:
    """λ of each domain, with a line at equal weights."""
    shown = [domain for domain in domains if domain.name in weights]
    if not shown:
        return None
    figure = go.Figure(
        go.Bar(
            x=[weights[domain.name] for domain in shown],
            y=[domain.label for domain in shown],
            orientation="h",
            marker={
                "color": [domain.colour for domain in shown],
                "pattern": {"shape": [domain.hatch for domain in shown]},
            },
            texttemplate="%{x:.3f}",
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    finished(figure, 90 + 34 * len(shown), hovermode="closest")
    figure.add_vline(
        x=1 / len(weights), line={"color": _DARK, "width": 1.5, "dash": "dot"}
    )
    figure.update_xaxes(title=None, rangemode="tozero", tickformat=".2~f")
    return figure.update_yaxes(autorange="reversed")


def panels_plot(train: list[dict], panels: tuple[Panel, ...]) -> go.Figure | None:
    figure = make_subplots(
        1, len(panels), subplot_titles=[panel.title for panel in panels]
    )
    for column, panel in enumerate(panels, start=1):
        for field, colour in zip(panel.fields, (_DARK, _COLOURS[1]), strict=False):
            place = {"row": 1, "col": column, "smooth": panel.noisy}
            _draw(figure, train, field, field, {"color": colour}, **place)
        figure.update_yaxes(
            tickformat=panel.form, rangemode="tozero", row=1, col=column
        )
    return _finish_panels(figure, 300)


def thin(
    steps: np.ndarray, values: np.ndarray, points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbouring lines, equal in length, so that at most `points` are left.

    steps: int64 (N,); values: float64 (N,), NaN where missing, which means pass over. A run's step is its last line's.
    """
    size = -(-len(steps) // points)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return steps[np.minimum(starts + size, len(steps)) - 1], means


def _moving_mean(values):
    """Centred, over a share of the run; passes over gaps and is narrower at both ends. The values themselves if few."""
    width = round(len(values) * _SMOOTHING_SHARE)
    if width < 3:
        return values
    finite = np.isfinite(values)
    kernel = np.ones(width)
    counts = np.convolve(finite, kernel, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _draw(
    figure, records, field, label, line, domain=None, smooth=True, faint=True, **place
):
    values = series(records, field, domain)
    if not np.isfinite(values).any():
        return
    steps, values = thin(
        np.array([record["step"] for record in records], dtype=np.int64), values
    )
    bold = _moving_mean(values) if smooth else values
    common = {
        "x": steps.astype(np.int32),
        "connectgaps": True,
        "legendgroup": label,
        **place,
    }
    if faint and bold is not values:
        look = {"opacity": 0.2, "line": {"color": line["color"], "width": 1}}
        figure.add_scatter(
            y=values.astype(np.float32),
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            **look,
            **common,
        )
    look = {
        "mode": "lines" if len(steps) > _FEW_POINTS else "lines+markers",
        "line": {"width": 2, **line},
    }
    figure.add_scatter(
        y=bold.astype(np.float32),
        name=label,
        marker={"size": 5},
        showlegend=True,
        **look,
        **common,
    )


def _range(figure):
    """The lowest and highest of the lines, faint ones without their outermost hundredths: one spike flattens nothing."""
    low, high = [], []
    for trace in figure.data:
        edge = 1 if trace.opacity else 0
        values = np.asarray(trace.y)[np.isfinite(trace.y)]
        low.append(np.percentile(values, edge))
        high.append(np.percentile(values, 100 - edge))
    return float(min(low)), float(max(high))


def finished(figure, height, **layout):
    """The figure in the report's look, or None where nothing is drawn in it."""
    if not figure.data:
        return None
    layout = {
        "margin": {"l": 64, "r": 16, "t": 16, "b": 48},
        "hovermode": "x unified",
        **layout,
    }
    font = {"family": _FONT, "size": 13, "color": _DARK}
    figure.update_layout(
        template="plotly_white",
        height=height,
        font=font,
        hoverlabel={"namelength": -1},
        **layout,
    )
    figure.update_layout(legend_tracegroupgap=0)
    title = {"text": "step", "font": {"size": 13}, "standoff": 8}
    figure.update_xaxes(
        gridcolor=_GRID,
        zeroline=False,
        tickformat=",d",
        exponentformat="none",
        title=title,
    )
    return figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True)


def _finish_panels(figure, height):
    if finished(figure, height, margin=_SMALL_MARGIN, showlegend=False) is None:
        return None
    figure.update_annotations(font={"size": 13, "color": _DARK})
    return figure.update_xaxes(title=None, nticks=5, tickformat="~s")
