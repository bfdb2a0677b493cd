"""The pictures of a report as SVG: bars that stand in a line of text, and memory against accuracy.

Colours are CSS classes, so that the page decides on light and dark; widths of bars are shares of what room there is, so
that text keeps its size on a phone and in print. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from memopt.errors import printable

_WIDTH, _HEIGHT = 560, 340  # of a scatter, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 30, 46
_LABEL_CHARACTERS, _CHARACTER, _LINE = 24, 6.3, 13
_LOGARITHMIC_FROM = 20  # largest through smallest value
_BAR_HEIGHT = 16


@dataclass(frozen=True)
class Segment:
    """A piece of a bar: from `start` to `end`, shares of the whole width."""

    start: float
    end: float
    style: str
    title: str


@dataclass(frozen=True)
class Tick:
    """A mark on a bar, at a share of the whole width."""

    at: float
    style: str
    title: str


@dataclass(frozen=True)
class Point:
    """One row in a scatter; the further left and up, the better."""

    x: float
    y: float
    name: str
    title: str
    shape: str = "circle"  # or "square", "triangle", "diamond"


@dataclass(frozen=True)
class Scale:
    """From values to shares of the width; logarithmic where values lie far apart."""

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 to 1 within the scale."""
        if self.logarithmic:
            value, low, high = (math.log10(max(each, 1e-12)) for each in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


def scale_for(values: Sequence[float], *, from_zero: bool = False) -> Scale:
    """A scale with some room around the values.

    >>> scale_for([1.0, 2.0], from_zero=True)
    Scale(low=0.0, high=2.06, logarithmic=False)
    """
    low, high = min(values), max(values)
    if from_zero:
        return Scale(0.0, max(high, 1e-9) * 1.03)
    if low > 0 and high / low > _LOGARITHMIC_FROM:
        return Scale(low / 1.4, high * 1.4, logarithmic=True)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(max(low - room, 0.0) if low >= 0 else low - room, high + room)


def bar(segments: Sequence[Segment], ticks: Sequence[Tick] = (), *, label: str) -> str:
    """A bar as wide as the room it has, with titles that show when the mouse rests on a piece."""
    pieces = [
        f'<rect class="{piece.style}" x="{100 * piece.start:.3f}%" y="1" width="{100 * (piece.end - piece.start):.3f}%"'
        f' height="{_BAR_HEIGHT - 2}"><title>{text(piece.title)}</title></rect>'
        for piece in segments
        if piece.end > piece.start
    ]
    marks = [
        f'<line class="{tick.style}" x1="{100 * tick.at:.3f}%" x2="{100 * tick.at:.3f}%" y1="0" y2="{_BAR_HEIGHT}">'
        f"<title>{text(tick.title)}</title></line>"
        for tick in ticks
    ]
    head = f'<svg class="bar" width="100%" height="{_BAR_HEIGHT}" role="img" aria-label="{text(label)}">'
    return head + "".join(pieces + marks) + "</svg>"


def scatter(points: Sequence[Point], *, x_title: str, y_title: str, show_x: Show, show_y: Show) -> str:
    """Points with the line of those that no other beats in both directions, which carry their names."""
    x_scale, y_scale = scale_for([point.x for point in points]), scale_for([point.y for point in points])
    placed = [(point, _across(x_scale.share(point.x)), _down(y_scale.share(point.y))) for point in points]
    best = frontier(points)
    drawn = [
        *_axis(x_scale, y_scale, show_x, show_y),
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{text(x_title)}</text>',
        f'<text class="axis" x="{_LEFT}" y="16">{text(y_title)}</text>',
        *_line([(x, y) for point, x, y in placed if point in best]),
        *(_mark(point, x, y, "best" if point in best else "beaten") for point, x, y in placed),
        *_names([(point, x, y) for point, x, y in placed if point in best], [(x, y) for _, x, y in placed]),
    ]
    label = text(f"{y_title}, {x_title}")
    head = f'<svg class="scatter" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return head + "".join(drawn) + "</svg>"


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is as far left and as high, and further in one of the two.

    >>> a, b, c = (Point(x, y, name, "") for x, y, name in ((1, 90, "a"), (2, 95, "b"), (3, 94, "c")))
    >>> [point.name for point in frontier([c, b, a])]
    ['a', 'b']
    """
    ordered = sorted(points, key=lambda point: (point.x, -point.y))
    best: list[Point] = []
    for point in ordered:
        if not best or point.y > best[-1].y or (point.x, point.y) == (best[-1].x, best[-1].y):
            best.append(point)
    return best


def text(value: str) -> str:
    """The text, harmless in HTML and SVG: escaped, control characters made visible."""
    return escape(printable(value), quote=True)


Show = Callable[[float], str]


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _down(share: float) -> float:
    return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _axis(x_scale: Scale, y_scale: Scale, show_x: Show, show_y: Show) -> Iterator[str]:
    for value in _round_values(x_scale):
        x = _across(x_scale.share(value))
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        place = f'x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
        yield f'<text class="tick" {place}>{text(show_x(value))}</text>'
    for value in _round_values(y_scale):
        y = _down(y_scale.share(value))
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text(show_y(value))}</text>'


def _round_values(scale: Scale) -> list[float]:
    """Some round values within the scale: 1, 2 or 5 times a power of ten apart; on a logarithmic one, such values."""
    if scale.logarithmic:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        within = [value for value in found if scale.low <= value <= scale.high]
        return within if len(within) <= 6 else [value for value in within if f"{value:e}".startswith("1.")] or within
    rough = (scale.high - scale.low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.99)
    first = math.ceil(scale.low / step)
    return [round(i * step, 12) for i in range(first, math.floor(scale.high / step) + 1)]


def _line(places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Steps from each of the best to the next: what lies below them is beaten."""
    ordered = sorted(places)
    if len(ordered) > 1:
        steps = "".join(f" H{x:.1f} V{y:.1f}" for x, y in ordered[1:])
        yield f'<path class="frontier" d="M{ordered[0][0]:.1f} {ordered[0][1]:.1f}{steps}"/>'


def _mark(point: Point, x: float, y: float, style: str) -> str:
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>',
        "square": f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>',
        "triangle": f'<path d="M{x:.1f} {y - 6.5:.1f} l6.2 11 h-12.4 z"/>',
        "diamond": f'<path d="M{x:.1f} {y - 7:.1f} l7 7 l-7 7 l-7 -7 z"/>',
    }
    return f'<g class="{style}">{shapes[point.shape]}<title>{text(point.title)}</title></g>'


def _names(points: Sequence[tuple[Point, float, float]], taken: Sequence[tuple[float, float]]) -> Iterator[str]:
    """A name beside each point, where it covers neither a point nor another name, nor leaves the picture."""
    boxes = [(x - 7, y - 7, x + 7, y + 7) for x, y in taken]
    for point, x, y in points:
        name = point.name if len(point.name) <= _LABEL_CHARACTERS else point.name[: _LABEL_CHARACTERS - 1] + "…"
        width = _CHARACTER * len(name)
        for left, base in (
            (x + 10, y + 4), (x + 4, y - 10), (x + 4, y + 19), (x - 10 - width, y + 4), (x - width, y - 10),
            (x - width, y + 19),
        ):  # fmt: skip
            box = (left, base - _LINE + 3, left + width, base + 3)
            inside = box[0] > _LEFT and box[2] < _WIDTH and box[1] > _TOP - 10 and box[3] < _HEIGHT - _BOTTOM + 2
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                yield f'<text class="name" x="{left:.1f}" y="{base:.1f}">{text(name)}</text>'
                break


Box = tuple[float, float, float, float]


def _overlap(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
