"""Line charts, curves and stacked bars as SVG, for README.md: text, no library, no script, readable on
any background.
"""

import math
from dataclasses import dataclass, field
from html import escape

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#888888",
)  # Okabe and Ito's, for all eyes
_WIDTH = 480
_HEIGHT = 330
_LEFT = 56
_RIGHT = 12
_TOP = 34
_BOTTOM = 74


@dataclass(frozen=True)
class Panel:
    """A picture with a title and named axes. values: {series: a value, 0 or more, for each of
    `places`}.

    dashed: for some of these series, another line in the same colour. stacked: bars on top of
    each other instead of lines. top: the largest value of the axis, None: what the values need.
    """

    title: str
    places: list[str]
    values: dict[str, list[float]]
    x_title: str
    y_title: str
    dashed: dict[str, list[float]] = field(default_factory=dict)
    stacked: bool = False
    top: float | None = None


@dataclass(frozen=True)
class Curves:
    """A picture of points that lie anywhere. points: {series: (x, y), … by rising x}; x above 0,
    on a logarithmic axis.

    marks: levels that are drawn across, {name: y}. The axis of y begins and ends near the values.
    """

    title: str
    points: dict[str, list[tuple[float, float]]]
    x_title: str
    y_title: str
    marks: dict[str, float] = field(default_factory=dict)


def svg(panels: list[Panel | Curves]) -> str:
    """The panels beside each other."""
    parts = []
    for number, panel in enumerate(panels):
        drawn = _curves(panel) if isinstance(panel, Curves) else _panel(panel)
        left = number * _WIDTH
        parts.append(f'<g transform="translate({left} 0)">\n{drawn}\n</g>')
    inner = "\n".join(parts)
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{width}" '
        f'height="{_HEIGHT}" fill="white"/>\n{inner}\n</svg>\n'
    )


@dataclass(frozen=True)
class _Axes:
    """Where values of a panel lie in its picture."""

    slot: float  # width of a place
    height: float
    top: float  # the value at the upper end

    def x(self, place: int) -> float:
        return _LEFT + (place + 0.5) * self.slot

    def y(self, value: float) -> float:
        return _TOP + self.height * (1 - value / self.top)


def _panel(panel):
    highest = _highest(panel)
    step = _tick(panel.top or highest)
    width = _WIDTH - _LEFT - _RIGHT
    axes = _Axes(
        slot=width / len(panel.places),
        height=_HEIGHT - _TOP - _BOTTOM,
        top=panel.top or step * math.ceil(highest / step),
    )
    parts = [
        _text(_LEFT, 18, panel.title, weight="bold"),
        _text(_LEFT, _TOP - 4, panel.y_title, size=11),
    ]
    for tick in range(round(axes.top / step) + 1):
        level = axes.y(tick * step)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#ddd"/>'
        )
        parts.append(
            _text(_LEFT - 6, level + 4, f"{tick * step:g}", anchor="end")
        )
    below = _TOP + axes.height
    for number, place in enumerate(panel.places):
        parts.append(_text(axes.x(number), below + 16, place, anchor="middle"))
    middle = _LEFT + width / 2
    parts.append(
        _text(middle, below + 32, panel.x_title, anchor="middle", size=11)
    )
    if panel.stacked:
        parts += _bars(panel, axes)
    else:
        parts += _lines(panel, axes)
    parts += _legend(list(panel.values))
    return "\n".join(parts)


@dataclass(frozen=True)
class _Scale:
    """Where values of curves lie in their picture."""

    least_x: float
    most_x: float
    least_y: float
    most_y: float

    def x(self, value: float) -> float:
        whole = math.log(self.most_x / self.least_x)
        share = math.log(value / self.least_x) / whole
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.least_y) / (self.most_y - self.least_y)
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _curves(panel):
    points = [point for series in panel.points.values() for point in series]
    x_values = [x for x, _ in points]
    y_values = [y for _, y in points] + list(panel.marks.values())
    step = _tick(max(max(y_values) - min(y_values), 0.01))
    scale = _Scale(
        least_x=min(x_values) / 1.1,
        most_x=max(x_values) * 1.1,
        least_y=step * math.floor(min(y_values) / step),
        most_y=step * math.ceil(max(y_values) / step),
    )
    right = _WIDTH - _RIGHT
    parts = [
        _text(_LEFT, 18, panel.title, weight="bold"),
        _text(_LEFT, _TOP - 4, panel.y_title, size=11),
    ]
    for tick in range(round((scale.most_y - scale.least_y) / step) + 1):
        value = scale.least_y + tick * step
        level = scale.y(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#ddd"/>'
        )
        parts.append(_text(_LEFT - 6, level + 4, f"{value:.4g}", anchor="end"))
    below = _HEIGHT - _BOTTOM
    for value in _log_ticks(scale.least_x, scale.most_x):
        place = scale.x(value)
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{below}" '
            'stroke="#eee"/>'
        )
        parts.append(_text(place, below + 16, f"{value:,g}", anchor="middle"))
    middle = (_LEFT + right) / 2
    parts.append(
        _text(middle, below + 32, panel.x_title, anchor="middle", size=11)
    )
    for name, value in panel.marks.items():
        level = scale.y(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#222" stroke-dasharray="2 3"/>'
        )
        parts.append(_text(_LEFT + 4, level - 4, name, size=10))
    for colour, series in zip(_COLOURS, panel.points.values(), strict=False):
        drawn = [(scale.x(x), scale.y(y)) for x, y in series]
        parts += _line(drawn, colour, "")
    parts += _legend(list(panel.points))
    return "\n".join(parts)


def _log_ticks(least, most):
    """1, 2 and 5 times powers of ten between two values."""
    ticks = []
    power = 10.0 ** math.floor(math.log10(least))
    while power <= most:
        for factor in (1, 2, 5):
            if least <= power * factor <= most:
                ticks.append(power * factor)
        power *= 10
    return ticks


def _highest(panel):
    if not panel.stacked:
        return max(max(values) for values in panel.values.values())
    sums = [0] * len(panel.places)
    for values in panel.values.values():
        for number in range(len(panel.places)):
            sums[number] += values[number]
    return max(sums)


def _bars(panel, axes):
    """Each series on top of those before it."""
    parts = []
    below = [0.0] * len(panel.places)
    for colour, (name, values) in zip(
        _COLOURS, panel.values.items(), strict=False
    ):
        for number, value in enumerate(values):
            size = axes.height * value / axes.top
            left = axes.x(number) - 0.35 * axes.slot
            upper = axes.y(below[number]) - size
            parts.append(
                f'<rect x="{left:.1f}" width="{0.7 * axes.slot:.1f}" y="{upper:.1f}" '
                f'height="{size:.1f}" fill="{colour}"><title>{escape(name)}: '
                f"{value:g}</title></rect>"
            )
            below[number] += value
    return parts


def _lines(panel, axes):
    """Each series as a line, and its dashed one."""
    parts = []
    for colour, (name, values) in zip(
        _COLOURS, panel.values.items(), strict=False
    ):
        dashed = panel.dashed.get(name, [])
        for drawn, dashes in (
            (values, ""),
            (dashed, ' stroke-dasharray="5 4"'),
        ):
            points = []
            for number, value in enumerate(drawn):
                points.append((axes.x(number), axes.y(value)))
            parts += _line(points, colour, dashes)
    return parts


def _line(points, colour, dashes):
    """A line through points of the picture, and a circle on each."""
    corners = []
    circles = []
    for x, y in points:
        corners.append(f"{x:.1f},{y:.1f}")
        circles.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        )
    line = (
        f'<polyline points="{" ".join(corners)}" fill="none" stroke="{colour}" '
        f'stroke-width="2"{dashes}/>'
    )
    return [line, *circles]


def _legend(names):
    """Up to three names a line, below the axis."""
    parts = []
    room = (_WIDTH - _LEFT - _RIGHT) / 3
    for i, (colour, name) in enumerate(zip(_COLOURS, names, strict=False)):
        left = _LEFT + i % 3 * room
        base = _HEIGHT - 24 + i // 3 * 16
        parts.append(
            f'<rect x="{left:.1f}" y="{base - 9}" width="10" height="10" fill="{colour}"/>'
        )
        parts.append(_text(left + 14, base, name, size=11))
    return parts


def _tick(highest):
    """A round distance that cuts the axis into about five."""
    power = 10.0 ** math.floor(math.log10(highest / 5))
    return next(
        power * factor
        for factor in (1, 2, 5, 10)
        if power * factor >= highest / 5
    )


def _text(x, y, text, anchor="start", size=12, weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="#222">'
        f"{escape(text)}</text>"
    )
