"""Charts as inline SVG: drawn without scripts and coloured by the page's style, so that they print and go dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from onecard.report.scale import Scale, format_tick
from onecard.report.thin import Point, Thinned

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
# Half a character of the labels below the axis, which must not leave the picture.
_EDGE = 14


@dataclass(frozen=True)
class Dot:
    """A measured value with its standard error; `is_best` is marked."""

    x: float
    y: float
    error: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Chart:
    """What one picture shows over steps. `bottom` and `top` bound y; `label` says it to those who cannot see it."""

    label: str
    right: float
    bottom: float
    top: float
    curve: Thinned | None = None
    dots: tuple[Dot, ...] = ()
    is_log: bool = False
    joins_dots: bool = True


@dataclass(frozen=True)
class Bar:
    """A part of a bar: `share` of its length, and the number of its colour."""

    label: str
    share: float
    text: str
    colour: int


def draw_chart(chart: Chart, width: int, height: int) -> str:
    """Draws a chart in a box of so many units; the page scales it to the room there is."""
    x = Scale(0.0, chart.right, _LEFT, width - _RIGHT)
    y = Scale(chart.bottom, chart.top, height - _BOTTOM, _TOP, chart.is_log)
    frame = " ".join(f"{value:g}" for value in (x.start, x.end, y.start, y.end, chart.right, chart.bottom, chart.top))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.label)}" '
        f'data-frame="{frame} {int(chart.is_log)}">',
        *_axes(x, y, width),
    ]
    # Charts of one size share a name for it, and what it names.
    clip = f"inside-{width}-{height}"
    parts.append(f'<clipPath id="{clip}"><rect x="{x.start - 2}" y="0" width="{width}" height="{y.start}"/></clipPath>')
    parts.append(f'<g clip-path="url(#{clip})">')
    if chart.curve is not None:
        parts += _curve(chart.curve, x, y)
    if chart.dots:
        parts += _dots(chart, x, y)
    return "".join([*parts, "</g></svg>"])


def draw_bar(bars: Sequence[Bar], mark: float | None = None) -> str:
    """Draws parts side by side on a track of full length, with an upright mark at a share of it where one is given."""
    parts = ['<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">']
    parts.append('<rect class="track" width="100" height="6"/>')
    at = 0.0
    for bar in bars:
        wide = min(100 * bar.share, 100 - at)
        title = f"<title>{escape(bar.label)}: {escape(bar.text)}</title>"
        parts.append(f'<rect class="c{bar.colour}" x="{at:.3f}" width="{wide:.3f}" height="6">{title}</rect>')
        at += wide
    if mark is not None:
        parts.append(f'<rect class="limit" x="{min(100 * mark, 99.6):.3f}" width="0.4" height="6"/>')
    return "".join([*parts, "</svg>"])


def bounds_of(values: Sequence[float], *, is_log: bool = False, from_zero: bool = False) -> tuple[float, float]:
    """Finds the lower and upper edge of a chart with some air around its values."""
    low, high = min(values), max(values)
    if is_log:
        return low / 1.2, high * 1.2
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - margin), high + margin


def spans_decades(values: Sequence[float]) -> bool:
    """Says whether positive values differ so much that only their logarithms can be told apart."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 50


def _axes(x: Scale, y: Scale, width: int) -> list[str]:
    parts = []
    for value in y.ticks(4):
        at = y.place(value)
        parts.append(f'<path class="grid" d="M{x.start} {at:.1f}H{x.end}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6}" y="{at + 3.5:.1f}" text-anchor="end">{format_tick(value)}</text>'
        )
    for value in x.ticks(width // 80):
        if value != int(value):  # there is no half step
            continue
        at = min(x.place(value), width - _EDGE)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{format_tick(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    return parts


def _curve(curve: Thinned, x: Scale, y: Scale) -> list[str]:
    parts = []
    if curve.band:
        upper = [(at, high) for at, _, high in curve.band]
        lower = [(at, low) for at, low, _ in reversed(curve.band)]
        parts.append(f'<polygon class="band" points="{_points([*upper, *lower], x, y)}"/>')
    if len(curve.mean) == 1:
        parts.append(f'<circle class="point" {_circle(curve.mean[0], x, y)} r="2.5"/>')
    elif curve.mean:
        parts.append(f'<polyline class="line" points="{_points(curve.mean, x, y)}"/>')
    for at in curve.gaps:
        parts.append(f'<path class="gap" d="M{x.place(at):.1f} {y.start}v-7"/>')
    return parts


def _dots(chart: Chart, x: Scale, y: Scale) -> list[str]:
    dots = [dot for dot in chart.dots if math.isfinite(dot.y)]
    parts = []
    if chart.joins_dots and len(dots) > 1:
        parts.append(f'<polyline class="joint" points="{_points([(dot.x, dot.y) for dot in dots], x, y)}"/>')
    for dot in dots:
        if dot.error and math.isfinite(dot.error):
            low, high = y.place(dot.y - dot.error), y.place(dot.y + dot.error)
            if low - high > 2:
                parts.append(f'<path class="error" d="M{x.place(dot.x):.1f} {high:.1f}V{low:.1f}"/>')
        error = f" ± {dot.error:.2g}" if dot.error else ""
        title = f"<title>{dot.x:,.0f}: {dot.y:.5g}{error}</title>"
        kind, radius = ("best", 5) if dot.is_best else ("dot", 2 if len(dots) > 30 else 3)
        parts.append(f'<circle class="{kind}" {_circle((dot.x, dot.y), x, y)} r="{radius}">{title}</circle>')
    return parts


def _circle(point: Point, x: Scale, y: Scale) -> str:
    return f'cx="{x.place(point[0]):.1f}" cy="{y.place(point[1]):.1f}"'


def _points(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return " ".join(f"{x.place(at):.1f},{y.place(value):.1f}" for at, value in points)
