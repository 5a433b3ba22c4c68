"""Line charts as SVG without a script: places are percentages, so a chart fits any width and its letters stay."""

import math
import string
from collections.abc import Iterable
from dataclasses import dataclass

Point = tuple[float, float]
UNITS = 1000  # sides of the box in which a line is drawn, before it is stretched
FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" viewBox="0 0 760 400">
<style>
text { font: 14px Georgia, "DejaVu Serif", serif; fill: #6f665c; }
.chart { overflow: visible; }
.chart line { stroke: #e4dccf; }
.left, .end { text-anchor: end; }
.below, .key { text-anchor: middle; }
polyline { fill: none; stroke: #b3a08a; stroke-width: 1.2; vector-effect: non-scaling-stroke; }
circle { fill: #8a3a2b; }
.best { fill: none; stroke: #8a3a2b; stroke-width: 1.5; }
</style>
<rect width="760" height="400" fill="#fffdf9"/>
<text x="14" y="26">$left</text><text class="end" x="746" y="26">$right</text>
<text class="key" x="380" y="26">line: training, dots: val, circle: least val</text>
<svg x="64" y="46" width="632" height="310" overflow="visible">$drawing</svg>
</svg>
"""  # on a light ground of its own, for it is shown on light pages and dark ones


@dataclass(frozen=True)
class Axis:
    """The range of values that a chart shows, low < high."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Up to `most` + 1 round values, with their text; they are 1, 2 or 5 times a power of ten apart."""
        least = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
        return [(number * step, f"{number * step:,.{decimals}f}") for number in numbers]


def axis_of(values: Iterable[float], margin: float = 0.0) -> Axis:
    """The axis that holds these values, 0 to 1 without any, with a `margin` at both ends as a share of their range."""
    values = [*values] or [0.0, 1.0]
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1e-3)
    wider = margin * (high - low) if high - low > 1e-9 * size else size / 10
    return Axis(low - wider, high + wider)


def line(kind: str, points: list[Point], x: Axis, y: Axis) -> str:
    """A line of CSS class `kind`; what lies outside of the axes is cut off."""
    places = " ".join(f"{UNITS * x.share(a):.1f},{UNITS * (1 - y.share(b)):.1f}" for a, b in points)
    box = f'viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none"'
    return f'<svg {box}><polyline class="{kind}" points="{places}"/></svg>'


def dots(kind: str, points: list[Point], labels: list[str], x: Axis, y: Axis, radius: float = 3.5) -> str:
    """Dots of CSS class `kind`; a pointer over one shows its label, which must be HTML."""
    parts = []
    for (a, b), label in zip(points, labels, strict=True):
        place = f'{_at("cx", x.share(a))} {_at("cy", 1 - y.share(b))} r="{radius}"'
        parts.append(f'<circle class="{kind}" {place}><title>{label}</title></circle>')
    return "".join(parts)


def chart(
    name: str, x: Axis, y: Axis, marks: Iterable[str], unit: str, right: Axis | None = None, most: int = 4
) -> str:
    """Marks over a grid, with the values of `x` in its `unit` below, of `y` on the left and of `right` on the right.

    name: what a screen reader says of it, as HTML. most: values on the left, or the right, but for one.
    """
    parts = [f'<svg class="chart" role="img" aria-label="{name}">']
    for value, text in y.ticks(most):
        place = 1 - y.share(value)
        parts.append(f'<line x2="100%" {_at("y1", place)} {_at("y2", place)}/>')
        parts.append(f'<text class="left" x="0" {_at("y", place)} dx="-0.6em" dy="0.35em">{text}</text>')
    if right:
        for value, text in right.ticks(most):
            place = _at("y", 1 - right.share(value))
            parts.append(f'<text x="100%" {place} dx="1em" dy="0.35em">{text}</text>')
    ticks = x.ticks(4)
    for value, text in ticks:
        text += f" {unit}" if value == ticks[-1][0] else ""
        parts.append(f'<text class="below" {_at("x", x.share(value))} y="100%" dy="1.5em">{text}</text>')
    return "".join([*parts, *marks, "</svg>"])


def picture(titles: list[str], drawing: str) -> str:
    """A chart of a loss as the text of a file of its own, with the titles of its left axis, and of its right one."""
    left, right = (*titles, "")[:2]
    return string.Template(FRAME).substitute(left=left, right=right, drawing=drawing)


def spark(points: list[Point], x: Axis, y: Axis) -> str:
    """A line without a frame, as small as a word."""
    return f'<svg class="spark" aria-hidden="true">{line("val", points, x, y)}</svg>'


def _at(name: str, share: float) -> str:
    """An attribute that places a mark."""
    return f'{name}="{100 * share:.2f}%"'
