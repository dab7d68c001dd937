"""Line charts and maps of points as inline SVG: no scripts, nothing to load, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 408.0, 26.0, 186.0
MOST_POINTS = 150
"""A longer curve is drawn through the means of this many groups of neighbouring points."""

MAP_SIDE, MAP_MARGIN = 620.0, 14.0
LEGEND_ROWS = 32


@dataclass(frozen=True)
class Series:
    """One curve: its name and its points. Points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Level:
    """A dashed line at a value worth knowing."""

    name: str
    value: float


@dataclass(frozen=True)
class Axis:
    """Values low … high, drawn at start … stop (in SVG units; start > stop for an axis that grows upwards)."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round numbers (multiples of 1, 2 or 5 times a power of ten), evenly spaced in low … high."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [number * step for number in range(first, last + 1)]
    return [low]


def round_range(
    values: Sequence[float], floor: float | None = None, ceiling: float | None = None
) -> tuple[float, float]:
    """Return (low, high) around the values, at round numbers; not beyond floor and ceiling where values are not either.

    It begins at the floor if that leaves no more than half of the range empty.
    """
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if floor is not None and min(values) >= floor:
        bottom = floor if min(values) - floor <= (top - floor) / 2 else max(bottom, floor)
    if ceiling is not None and max(values) <= ceiling:
        top = min(top, ceiling)
    return bottom, top


def thinned(series: Series) -> Series:
    """Return a curve of at most MOST_POINTS points, finite and in the order of x; each the mean of a group of neighbours."""
    points = sorted((x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y))
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    x = [math.fsum(x for x, _ in group) / len(group) for group in groups]
    y = [math.fsum(y for _, y in group) / len(group) for group in groups]
    return Series(series.name, x, y)


def short_number(value: float) -> str:
    """Return a number as people write it: three digits that count, thousands parted, tiny ones as 1e-05."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """Return a share (0-1) in percent, with two digits that count."""
    value = 100 * share
    if value >= 10 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    unit: str = "",
    floor: float | None = None,
    ceiling: float | None = None,
    levels: Sequence[Level] = (),
) -> str:
    """Return an SVG of curves over one pair of axes, or "" when no curve has a point.

    unit: written behind each value of y ("%"). floor, ceiling: what y cannot go beyond. levels: dashed lines, part of
    the range. Pointing at a place shows the values there. Curve number i has the class `curve c{i}`.
    """
    curves = [(number, curve) for number, curve in enumerate(map(thinned, series)) if curve.x]
    if not curves:
        return ""
    all_x = [x for _, curve in curves for x in curve.x]
    all_y = [y for _, curve in curves for y in curve.y] + [level.value for level in levels]
    horizontal = Axis(min(all_x), max(all_x) if max(all_x) > min(all_x) else min(all_x) + 1, LEFT, RIGHT)
    vertical = Axis(*round_range(all_y, floor, ceiling), BOTTOM, TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">']
    parts += _axes(horizontal, vertical, x_label, unit)
    for level in levels:
        y = vertical.place(level.value)
        parts.append(f'<path class="level" d="M{LEFT:g} {y:.1f}H{RIGHT:g}"/>')
        parts.append(f'<text class="level-name" x="{RIGHT:g}" y="{y - 4:.1f}">{escape(level.name)}</text>')
    for number, curve in curves:
        places = [(horizontal.place(x), vertical.place(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        if len(places) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="curve c{number}" points="{line}"/>')
        parts.append(f'<circle class="end c{number}" cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3"/>')
    parts += _readings(curves, horizontal, vertical, x_label, unit)
    return "".join(parts) + "</svg>"


def _axes(horizontal: Axis, vertical: Axis, x_label: str, unit: str) -> list[str]:
    parts = []
    marks = ticks(vertical.low, vertical.high)
    for value in marks:
        y = vertical.place(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{RIGHT:g}"/>')
        label = _tick(value, marks) + escape(unit)
        parts.append(f'<text class="tick y" x="{LEFT - 7:g}" y="{y + 3.5:.1f}">{label}</text>')
    marks = [mark for mark in ticks(horizontal.low, horizontal.high, 7) if abs(mark - round(mark)) < 1e-9]
    for value in marks:
        x = horizontal.place(value)
        parts.append(f'<path class="notch" d="M{x:.1f} {BOTTOM:g}v4"/>')
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{BOTTOM + 17:g}">{_tick(value, marks)}</text>')
    parts.append(f'<path class="base" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>')
    parts.append(f'<text class="axis-name" x="{RIGHT:g}" y="{HEIGHT - 3:g}">{escape(x_label)}</text>')
    return parts


def _tick(value: float, marks: Sequence[float]) -> str:
    """Return a mark's number, with as many decimals as the marks of this axis need."""
    if len(marks) < 2:
        return short_number(value)
    step = marks[1] - marks[0]
    if step < 1e-4:
        return "0" if abs(value) < step / 2 else f"{value:.1e}"
    return f"{value:,.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"


def _readings(
    curves: Sequence[tuple[int, Series]], horizontal: Axis, vertical: Axis, x_label: str, unit: str
) -> list[str]:
    """Return the strips that show the values under the pointer."""
    values = {(number, x): y for number, curve in curves for x, y in zip(curve.x, curve.y, strict=True)}
    places = sorted({x for _, x in values})
    edges = [LEFT, *(horizontal.place((a + b) / 2) for a, b in zip(places, places[1:], strict=False)), RIGHT]
    parts = []
    for x, start, stop in zip(places, edges, edges[1:], strict=False):
        here = [(number, curve.name, values[number, x]) for number, curve in curves if (number, x) in values]
        at = horizontal.place(x)
        reading = ", ".join(f"{name} {short_number(y)}{unit}" for _, name, y in here)
        text = f"{x_label} {x:,.0f}: {reading}"
        dots = "".join(
            f'<circle class="dot c{number}" cx="{at:.1f}" cy="{vertical.place(y):.1f}" r="3.5"/>'
            for number, _, y in here
        )
        parts.append(
            f'<g class="reading"><rect x="{start:.1f}" y="{TOP:g}" width="{max(stop - start, 0.1):.1f}" '
            f'height="{BOTTOM - TOP:g}"/><path d="M{at:.1f} {TOP:g}V{BOTTOM:g}"/>{dots}'
            f'<text x="{RIGHT:g}" y="10">{escape(text)}</text></g>'
        )
    return parts


def group_colour(number: int, groups: int) -> str:
    """Return the CSS colour of one of several groups: hues evenly around the circle, every other one lighter."""
    lightness = 0.60 if groups <= 8 else (0.54, 0.72)[number % 2]
    return f"oklch({lightness:g} 0.16 {(25 + 360 * number / max(groups, 1)) % 360:.0f})"


def point_map(
    points: Sequence[tuple[float, float]], groups: Sequence[int] | None, names: Sequence[str], *, title: str
) -> str:
    """Return an SVG of points in the plane, both axes at one scale, coloured by group and with a legend.

    groups: one number for each point, an index into names; None: all alike. Pointing at a group shows it alone. The
    legend names the LEGEND_ROWS largest groups.
    """
    if not points:
        return ""
    middle = [(min(axis) + max(axis)) / 2 for axis in zip(*points, strict=True)]
    reach = max(max(axis) - min(axis) for axis in zip(*points, strict=True)) / 2 or 1.0
    horizontal = Axis(middle[0] - reach, middle[0] + reach, MAP_MARGIN, MAP_SIDE - MAP_MARGIN)
    vertical = Axis(middle[1] - reach, middle[1] + reach, MAP_SIDE - MAP_MARGIN, MAP_MARGIN)
    members: dict[int, list[str]] = {}
    for place, group in zip(points, groups if groups is not None else [0] * len(points), strict=True):
        dot = f'<circle cx="{horizontal.place(place[0]):.1f}" cy="{vertical.place(place[1]):.1f}" r="3.2"/>'
        members.setdefault(group, []).append(dot)
    listed = sorted(sorted(members, key=lambda group: (-len(members[group]), group))[:LEGEND_ROWS])
    width = MAP_SIDE + (200 if groups is not None else 0)
    parts = [f'<svg class="map" viewBox="0 0 {width:g} {MAP_SIDE:g}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<rect class="ground" width="{MAP_SIDE:g}" height="{MAP_SIDE:g}" rx="8"/>')
    order = sorted(members)
    for rank, group in enumerate(order):
        if groups is None:
            parts.append(f'<g class="group plain">{"".join(members[group])}</g>')
            continue
        name = escape(names[group])
        legend = ""
        if group in listed:
            y = MAP_MARGIN + 6 + listed.index(group) * (MAP_SIDE - 2 * MAP_MARGIN) / LEGEND_ROWS
            legend = f'<circle cx="{MAP_SIDE + 22:g}" cy="{y:.1f}" r="4.5"/>'
            legend += f'<text x="{MAP_SIDE + 34:g}" y="{y + 4:.1f}">{name}</text>'
        colour = group_colour(rank, len(order))
        parts.append(f'<g class="group" fill="{colour}"><title>{name}</title>{"".join(members[group])}{legend}</g>')
    return "".join(parts) + "</svg>"
