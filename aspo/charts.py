"""Small charts as inline SVG: lines over steps, and points with two intervals.

Colours and fonts come from the page's CSS (classes `series-0`, `series-1`, ...), so that a chart follows light and dark
and needs nothing from outside the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from aspo.evaluation.statistics import Estimate

WIDTH, HEIGHT = 360, 230  # viewBox units, about CSS pixels in the page's grid, so that 11-unit text stays legible
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 34
MAX_POINTS = 60
SERIES = 6  # colours the page's CSS defines

Points = Sequence[tuple[float, float]]
Styles = Mapping[str, int]  # name of a line -> its number, so that a system looks the same in every chart


def line_chart(label: str, series: Mapping[str, Points], styles: Styles, x_label: str = "step") -> str:
    """One line per entry of `series` (name -> (x, y) points) as an `<svg>` string; non-finite points break the line.

    More than MAX_POINTS points are drawn as means of equal runs of points. A chart without points says so.
    """
    drawn = {name: _thin(points) for name, points in series.items()}
    finite = [(x, y) for points in drawn.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return _svg(
            label, f'<text class="note" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">not logged</text>'
        )
    x_axis, y_axis = (
        _Axis([x for x, _ in finite], LEFT, WIDTH - RIGHT),
        _Axis([y for _, y in finite], HEIGHT - BOTTOM, TOP),
    )
    parts = [_grid(x_axis, y_axis, x_label)]
    for name, points in drawn.items():
        style = f"series-{styles[name] % SERIES}"
        runs = _finite_runs(points)
        path = "".join(
            "".join(f"{'L' if k else 'M'}{x_axis(x):.1f} {y_axis(y):.1f}" for k, (x, y) in enumerate(run))
            for run in runs
        )
        parts.append(f'<path class="line {style}" d="{path}"><title>{escape(name)}</title></path>')
        parts += [
            f'<circle class="dot {style}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.5">'
            f"<title>{escape(name)}: {number(y)} at {escape(x_label)} {x:g}</title></circle>"
            for run in runs
            for x, y in (run if len(points) <= 25 else run[-1:])
        ]
    return _svg(label, "".join(parts))


def interval_chart(
    label: str, points: Mapping[str, tuple[Estimate, Estimate]], x_label: str, y_label: str, styles: Styles
) -> str:
    """One cross per entry of `points` (name -> (x, y) estimates): the value and both intervals, named beside it."""
    known = {name: xy for name, xy in points.items() if all(math.isfinite(v.value) for v in xy)}
    if not known:
        return _svg(
            label, f'<text class="note" x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no figures</text>'
        )
    x_axis = _Axis([v for x, _ in known.values() for v in (x.low, x.high, x.value)], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([v for _, y in known.values() for v in (y.low, y.high, y.value)], HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, x_label)]
    parts.append(f'<text class="note" x="{LEFT + 4}" y="{TOP + 8}">{escape(y_label)}</text>')
    for name, (x, y) in known.items():
        style = f"series-{styles[name] % SERIES}"
        cx, cy = x_axis(x.value), y_axis(y.value)
        cross = f"M{x_axis(x.low):.1f} {cy:.1f}H{x_axis(x.high):.1f}M{cx:.1f} {y_axis(y.low):.1f}V{y_axis(y.high):.1f}"
        end = cx > WIDTH * 0.75
        parts.append(
            f'<path class="line {style}" d="{cross}"/>'
            f'<circle class="dot {style}" cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>'
            f'<text class="name" x="{cx + (-7 if end else 7):.1f}" y="{cy - 6:.1f}"'
            f' text-anchor="{"end" if end else "start"}">{escape(name)}</text>'
        )
    return _svg(label, "".join(parts))


def legend(names: Sequence[str], styles: Styles) -> str:
    """The key of the line charts, once for all of them."""
    keys = "".join(
        '<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="line series-{styles[name] % SERIES}" d="M0 4H26"/></svg>{escape(name)}</li>'
        for name in names
    )
    return f'<ul class="legend">{keys}</ul>'


def number(value: float) -> str:
    """A figure for people: about three significant digits, a true minus sign, "–" for an undefined one."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if "e" in text:
        text = f"{value:.1e}"
    return text.replace("-", "−")


class _Axis:
    """A linear scale from data to SVG units over a range with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
            low, high = low - max(0.5, abs(low) * 0.1), high + max(0.5, abs(high) * 0.1)
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 4)
        self.low, self.high = math.floor(low / step) * step, math.ceil(high / step) * step
        self.ticks = [self.low + k * step for k in range(round((self.high - self.low) / step) + 1)]
        self.digits = max(0, -math.floor(math.log10(step)))
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, tick: float) -> str:
        if abs(tick) >= 1e5 or self.digits > 5:
            return number(tick)
        return f"{tick:.{self.digits}f}".replace("-", "−")


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        zero = " zero" if abs(tick) < 1e-12 else ""
        parts.append(f'<path class="grid{zero}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_axis.text(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        place = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {place}>{x_axis.text(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="note" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _svg(label: str, inside: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _thin(points: Points) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[k : k + size] for k in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _finite_runs(points: Points) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
