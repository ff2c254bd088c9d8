"""Line charts and stacked bars as SVG, for README.md: text, no library, no script, readable on
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


def svg(panels: list[Panel]) -> str:
    """The panels beside each other."""
    inner = "\n".join(
        f'<g transform="translate({i * _WIDTH} 0)">\n{_panel(panel)}\n</g>'
        for i, panel in enumerate(panels)
    )
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{width}" '
        f'height="{_HEIGHT}" fill="white"/>\n{inner}\n</svg>\n'
    )


def _panel(panel):
    if panel.stacked:
        highest = max(
            sum(values[i] for values in panel.values.values())
            for i in range(len(panel.places))
        )
    else:
        highest = max(max(values) for values in panel.values.values())
    step = _tick(panel.top or highest)
    top = panel.top or step * math.ceil(highest / step)
    width = _WIDTH - _LEFT - _RIGHT
    height = _HEIGHT - _TOP - _BOTTOM
    slot = width / len(panel.places)

    def x(i):
        return _LEFT + (i + 0.5) * slot

    def y(value):
        return _TOP + height * (1 - value / top)

    parts = [
        _text(_LEFT, 18, panel.title, weight="bold"),
        _text(_LEFT, _TOP - 4, panel.y_title, size=11),
    ]
    for tick in range(round(top / step) + 1):
        level = y(tick * step)
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#ddd"/>',
            _text(_LEFT - 6, level + 4, f"{tick * step:g}", anchor="end"),
        ]
    parts += [
        _text(x(i), _TOP + height + 16, place, anchor="middle")
        for i, place in enumerate(panel.places)
    ]
    parts.append(
        _text(
            _LEFT + width / 2,
            _TOP + height + 32,
            panel.x_title,
            anchor="middle",
            size=11,
        )
    )
    below = [0.0] * len(panel.places)
    for colour, (name, values) in zip(_COLOURS, panel.values.items(), strict=False):
        if panel.stacked:
            for i, value in enumerate(values):
                size = height * value / top
                parts.append(
                    f'<rect x="{x(i) - 0.35 * slot:.1f}" width="{0.7 * slot:.1f}" '
                    f'y="{y(below[i]) - size:.1f}" '
                    f'height="{size:.1f}" fill="{colour}"><title>{escape(name)}: '
                    f"{value:g}</title></rect>"
                )
                below[i] += value
        else:
            for drawn, dashes in (
                (values, ""),
                (panel.dashed.get(name, []), ' stroke-dasharray="5 4"'),
            ):
                there = [(x(i), y(value)) for i, value in enumerate(drawn)]
                line = " ".join(f"{a:.1f},{b:.1f}" for a, b in there)
                parts.append(
                    f'<polyline points="{line}" fill="none" stroke="{colour}" '
                    f'stroke-width="2"{dashes}/>'
                )
                parts += [
                    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>'
                    for a, b in there
                ]
    return "\n".join([*parts, *_legend(list(panel.values))])


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
        power * factor for factor in (1, 2, 5, 10) if power * factor >= highest / 5
    )


def _text(x, y, text, anchor="start", size=12, weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="#222">'
        f"{escape(text)}</text>"
    )
