"""Charts as inline SVG: crisp, coloured by the page's own variables, every mark with a title to hover over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 30, 36
_MOST_POINTS, _MOST_DOTS = 300, 45
_LABEL_COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#59a14f", "#b07aa1", "#d4a72c", "#9c755f", "#ff9da7", "#4fb3ac", "#8f8f8f",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line: its name, the colour as a CSS value, and points (x, y) by x. `reference`: a dashed line at one y."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    reference: bool = False


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot, with what hovering over it says."""

    x: float
    y: float
    colour: str
    title: str


def label_colour(label: int, count: int) -> str:
    """A colour for each of `count` classes: ten well apart, or else hues evenly spaced."""
    if count <= len(_LABEL_COLOURS):
        return _LABEL_COLOURS[label]
    return f"hsl({360 * label / count:.0f} 62% {52 if label % 2 else 62}%)"


def line_chart(series: Sequence[Series], *, x_name: str, y_name: str) -> str:
    """Lines over a common x; infinities and NaN are left out."""
    lines = [Series(s.name, s.colour, _thin(_finite(s.points)), s.reference) for s in series]
    curves = [line for line in lines if not line.reference]
    frame = _Frame.around([x for line in curves for x, _ in line.points], [y for line in lines for _, y in line.points])
    body = "".join(_reference(line, frame) if line.reference else _line(line, frame) for line in lines)
    return _svg(frame.axes(x_name, y_name) + body, f"{y_name} over {x_name}")


def scatter_chart(dots: Sequence[Dot], *, x_name: str, y_name: str) -> str:
    """Points with axes."""
    frame = _Frame.around([dot.x for dot in dots], [dot.y for dot in dots])
    return _svg(frame.axes(x_name, y_name) + _circles(dots, frame, 4.5), f"{y_name} against {x_name}")


def map_chart(dots: Sequence[Dot], name: str) -> str:
    """Points of a map, whose axes mean nothing: square, without ticks."""
    side = 360
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    frame = _Frame(_span(xs, 0.04), _span(ys, 0.04), side, side, (6, 6, 6, 6))
    return _svg(_circles(dots, frame, 2.6), name, side, side)


def bar_chart(groups: Sequence[str], series: Sequence[Series], *, y_name: str) -> str:
    """Grouped bars from 0; point (g, y) of a series is its bar in group g."""
    values = [y for line in series for _, y in line.points]
    low, high = min(0.0, *values), max(0.0, *values)
    frame = _Frame((-0.5, len(groups) - 0.5), _span([low, high], 0.06 if low < 0 else 0.0), _WIDTH, _HEIGHT)
    width = 0.8 / len(series)
    body = []
    for place, line in enumerate(series):
        for group, y in line.points:
            left, right = (frame.x(group - 0.4 + width * (place + side)) for side in (0, 0.94))
            top, bottom = frame.y(max(y, 0)), frame.y(min(y, 0))
            title = escape(f"{groups[int(group)]}, {line.name}: {y:.4f}")
            body.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(bottom - top, 0.5):.1f}" '
                f'fill="{line.colour}" rx="1.5"><title>{title}</title></rect>'
                f'<text class="value" x="{(left + right) / 2:.1f}" y="{top - 3:.1f}">{round(y, 3) + 0.0:.3f}</text>'
            )
    names = "".join(
        f'<text class="tick" text-anchor="middle" x="{frame.x(place):.1f}" y="{_HEIGHT - 18}">{escape(name)}</text>'
        for place, name in enumerate(groups)
    )
    return _svg(frame.y_axis(y_name) + "".join(body) + names, y_name)


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    width: int = _WIDTH
    height: int = _HEIGHT
    margins: tuple[int, int, int, int] = (_LEFT, _RIGHT, _TOP, _BOTTOM)

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> "_Frame":
        return cls(_span(xs, 0.02), _span(ys, 0.06))

    def x(self, value: float) -> float:
        left, right, _, _ = self.margins
        return left + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.width - left - right)

    def y(self, value: float) -> float:
        _, _, top, bottom = self.margins
        return self.height - bottom - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.height - top - bottom)

    def axes(self, x_name: str, y_name: str) -> str:
        bottom = self.height - self.margins[3]
        ticks = "".join(
            f'<text class="tick" text-anchor="middle" x="{self.x(value):.1f}" y="{bottom + 15}">{_short(value)}</text>'
            for value in _ticks(*self.xs)
        )
        name = f'<text class="axis" text-anchor="end" x="{self.width - self.margins[1]}" y="{self.height - 5}">'
        return self.y_axis(y_name) + ticks + f"{name}{escape(x_name)}</text>"

    def y_axis(self, y_name: str) -> str:
        left, right = self.margins[0], self.width - self.margins[1]
        lines = "".join(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{left - 6}" y="{self.y(value) + 3.5:.1f}">{_short(value)}</text>'
            for value in _ticks(*self.ys)
        )
        return lines + f'<text class="axis" x="{left - 40}" y="14">{escape(y_name)}</text>'


def _line(line: Series, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    radius = 2.4 if len(places) <= _MOST_DOTS else 0
    marks = []
    for (x, y), (place_x, place_y) in zip(line.points, places, strict=True):
        title = escape(f"{line.name}: {_exact(y)} at {_exact(x)}")
        marks.append(
            f'<g><circle cx="{place_x:.1f}" cy="{place_y:.1f}" r="7" fill="transparent"/>'
            f'<circle class="mark" cx="{place_x:.1f}" cy="{place_y:.1f}" r="{radius}" fill="{line.colour}"/>'
            f"<title>{title}</title></g>"
        )
    return f'<polyline class="line" points="{path}" stroke="{line.colour}"/>' + "".join(marks)


def _reference(line: Series, frame: _Frame) -> str:
    if not line.points:
        return ""
    y, value = frame.y(line.points[0][1]), line.points[0][1]
    left, right = frame.margins[0], frame.width - frame.margins[1]
    return (
        f'<g><line class="reference" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{line.colour}"/>'
        f'<text class="note" text-anchor="end" x="{right}" y="{y - 4:.1f}">{escape(line.name)} {_exact(value)}</text>'
        f"<title>{escape(line.name)}: {_exact(value)}</title></g>"
    )


def _circles(dots: Sequence[Dot], frame: _Frame, radius: float) -> str:
    return "".join(
        f'<circle class="dot" cx="{frame.x(dot.x):.1f}" cy="{frame.y(dot.y):.1f}" r="{radius}" fill="{dot.colour}">'
        f"<title>{escape(dot.title)}</title></circle>"
        for dot in dots
    )


def _svg(body: str, name: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, evenly spaced, first and last among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(place * step)] for place in range(_MOST_POINTS)]


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the lowest to the highest, widened by a share, and never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high == low:
        widening = abs(low) * 0.1 or 0.5
        return low - widening, high + widening
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in [low, high]."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [round(place * step, 12) for place in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _exact(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e12 else f"{value:.4g}"
