"""A line chart as inline SVG: its colours come from the page's CSS, so it is legible in light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH_PX, HEIGHT_PX = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_MAX_POINTS = 300
_NUM_COLORS = 8  # the page defines --series-0 .. --series-7; beyond them lines are dashed


@dataclass(frozen=True)
class Axis:
    """Data values to 0..1, linearly or by their logarithm, and the values that get a label."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float) -> Axis:
    """An axis over [low, high] with about five ticks at multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:  # one value only: some room around it
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    gap = min((factor * power for factor in (1, 2, 5, 10)), key=lambda gap: abs(math.log(gap / rough)))
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return Axis(low, high, tuple(round(k * gap, 12 - math.floor(math.log10(gap))) for k in range(first, last + 1)))


def log_axis(low: float, high: float) -> Axis:
    """An axis over the decades around [low, high], both positive; at most about six of them get a tick."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = max(1, math.ceil((last - first) / 6))
    return Axis(10.0**first, 10.0**last, tuple(10.0**k for k in range(first, last + 1, stride)), log=True)


def value_axis(values: Sequence[float]) -> Axis:
    """Logarithmic where all values are positive and the greatest is over 100 times the smallest, else linear."""
    low, high = min(values), max(values)
    if low > 0 and high > 100 * low:
        return log_axis(low, high)
    margin = 0.04 * (high - low)  # so that no line runs along the edge
    return linear_axis(low - margin, high + margin)


def thin(points: Sequence[Point], max_points: int = _MAX_POINTS) -> list[Point]:
    """At most ``max_points``: the means of neighbours."""
    size = math.ceil(len(points) / max_points)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def line_chart(title: str, series: Mapping[str, Sequence[Point]], chart_id: str) -> str:
    """A ``<figure>`` with the lines, their legend and, for those who cannot see them, the same in words.

    Every series holds at least one point and points are finite; ``chart_id`` is unique on its page.
    """
    assert series
    assert all(series.values())
    everything = [point for points in series.values() for point in points]
    x_axis = linear_axis(min(x for x, _ in everything), max(x for x, _ in everything))
    y_axis = value_axis([y for _, y in everything])
    lines = "".join(_line(points, x_axis, y_axis, number) for number, points in enumerate(series.values()))
    scale = ", logarithmic scale" if y_axis.log else ""
    words = " ".join(_words(name, points) for name, points in series.items())
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 20 8" aria-hidden="true"><path d="M0 4H20" {_style(number)}/></svg>'
        f"{escape(name)}</li>"
        for number, name in enumerate(series)
        if len(series) > 1
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>{scale}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-labelledby="{chart_id}-t {chart_id}-d">'
        f'<title id="{chart_id}-t">{escape(title)} by step{scale}</title><desc id="{chart_id}-d">{escape(words)}</desc>'
        f'{_frame(x_axis, y_axis)}{lines}</svg><ul class="legend">{legend}</ul></figure>'
    )


def format_number(value: float) -> str:
    """Short, for an axis or a table: ``0.05``, ``1200``, ``3e-05``."""
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


def _x_px(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH_PX - _LEFT - _RIGHT)


def _y_px(axis: Axis, value: float) -> float:
    return HEIGHT_PX - _BOTTOM - axis.place(value) * (HEIGHT_PX - _TOP - _BOTTOM)


def _style(number: int) -> str:
    dash = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 2"')[number // _NUM_COLORS % 3]
    return f'class="line" style="stroke:var(--series-{number % _NUM_COLORS})"{dash}'


def _line(points: Sequence[Point], x_axis: Axis, y_axis: Axis, number: int) -> str:
    places = [(_x_px(x_axis, x), _y_px(y_axis, y)) for x, y in thin(points)]
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:var(--series-{number % _NUM_COLORS})"/>'
    return f'<path d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" {_style(number)}/>'


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    bottom, right = HEIGHT_PX - _BOTTOM, WIDTH_PX - _RIGHT
    parts = []
    for tick in y_axis.ticks:
        y = _y_px(y_axis, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for tick in x_axis.ticks:
        x = _x_px(x_axis, tick)
        anchor = "end" if x > right - 12 else "middle"
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{format_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT_PX - 2}" text-anchor="middle">step</text>')
    return "".join(parts)


def _words(name: str, points: Sequence[Point]) -> str:
    (first_x, first_y), (last_x, last_y) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    return (
        f"{name}: from {format_number(first_y)} at step {format_number(first_x)} to {format_number(last_y)} at step "
        f"{format_number(last_x)}, between {format_number(low)} and {format_number(high)}."
    )
