"""The plots of the page: bars with whiskers, intervals, strips of items, lines.

Rows of a plot are HTML: names wrap, values stand in a column of their own, and positions are per cent of the remaining
width, so that a plot fits a phone and a wide screen alike. Strips and lines, which have many points, are SVG. Colours
are classes of the page's style sheet, which has light and dark ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby


@dataclass(frozen=True)
class Bar:
    """`ends`: of the whisker. `role`: "merge", "parent" or "other", a class of the style sheet."""

    name: str
    value: float
    ends: tuple[float, float]
    said: str
    role: str


def bars(rows: Sequence[Bar], label: str, full: float | None = None) -> str:
    """Horizontal bars from 0 with whiskers.

    Args:
        label: for screen readers.
        full: the value at the right end; None: a little more than the largest.
    """
    top = full or 1.05 * max(max(row.ends[1] for row in rows), 1e-12)

    def place(value: float) -> float:
        return 100 * min(max(value / top, 0), 1)

    parts = []
    for row in rows:
        marks = f'<i class="bar {row.role}" style="width:{place(row.value):.2f}%"></i>'
        if row.ends[0] < row.ends[1]:
            marks += _span("whisker", place(row.ends[0]), place(row.ends[1]))
        parts.append(_row(row.name, marks, row.said, "track"))
    return _plot("bars", "".join(parts), label)


@dataclass(frozen=True)
class Interval:
    """`role`: "gain", "loss" or "even"."""

    name: str
    value: float
    low: float | None
    high: float | None
    role: str


def intervals(rows: Sequence[Interval], label: str, percent: bool) -> str:
    """A forest plot: a point and its 95 % interval in each row, around a line at 0."""
    edges = [0.0] + [edge for row in rows for edge in (row.value, row.low, row.high) if edge is not None]
    low, high = min(edges), max(edges)
    step = tick_step(high - low, 5 if percent else 3)  # numbers like +0.015 are wide
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    ticks = [low + number * step for number in range(round((high - low) / step) + 1)]
    zeros = [abs(tick) < step / 2 for tick in ticks]
    lines = "".join(
        f'<i class="{"zero" if zero else "grid"}" style="left:{place(tick):.2f}%"></i>'
        for tick, zero in zip(ticks, zeros, strict=True)
    )
    parts = []
    for row in rows:
        marks = lines
        if row.low is not None and row.high is not None:
            marks += _span(f"span {row.role}", place(row.low), place(row.high))
        marks += f'<i class="dot {row.role}" style="left:{place(row.value):.2f}%"></i>'
        parts.append(_row(row.name, marks))
    said = [f"{100 * tick:+.4g}" if percent else f"{tick:+.4g}" for tick in ticks]
    axis = "".join(
        f'<i style="left:{place(tick):.2f}%">{"0" if zero else text}</i>'
        for tick, zero, text in zip(ticks, zeros, said, strict=True)
    )
    return _plot("intervals", "".join(parts) + _row("", axis, kind="axis"), label)


def strips(rows: Sequence[tuple[str, Sequence[bool], str]], label: str) -> str:
    """(name, right or wrong for each item, role) in each row; all have the items in one order."""
    parts = []
    for name, right, role in rows:
        path, start = "", 0
        for kind, run in groupby(right):
            length = len(list(run))
            if kind:
                path += f"M{start} 0h{length}v1h-{length}z"
            start += length
        marks = (
            f'<svg viewBox="0 0 {max(start, 1)} 1" preserveAspectRatio="none"><path class="{role}" d="{path}"/></svg>'
        )
        parts.append(_row(name, marks, kind="track"))
    return _plot("strips", "".join(parts), label)


WIDTH, HEIGHT = 340, 168  # units of a line plot, about those of a phone's screen


def line(xs: Sequence[float], ys: Sequence[float], ends: tuple[str, str], label: str, percent: bool) -> str:
    """ys over xs from 0 to 1, with the straight line between the ends dashed."""
    low, high = min(ys), max(ys)
    step = tick_step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step
    left, right, top, bottom = 44, WIDTH - 10, 8, HEIGHT - 8

    def point(x: float, y: float) -> tuple[float, float]:
        return left + x * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for number in range(round((high - low) / step) + 1):
        tick = low + number * step
        y = point(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        said = f"{100 * tick:.4g}" if percent else f"{tick:.4g}"
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    points = [point(x, y) for x, y in zip(xs, ys, strict=True)]
    (x1, y1), (x2, y2) = points[0], points[-1]
    parts.append(f'<line class="chord" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    parts.append('<polyline class="curve" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in points) + '"/>')
    parts += [f'<circle class="merge" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    names = f'<div class="ends"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div>'
    return _plot("line", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>{names}', label)


def tick_step(span: float, most: int = 6) -> float:
    """1, 2 or 5 times a power of ten, for up to `most` steps."""
    if span <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    return next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)


def _row(name: str, marks: str, said: str = "", kind: str = "") -> str:
    value = f'<span class="value">{escape(said)}</span>' if said else ""
    return (
        f'<div class="row"><span class="name">{escape(name)}</span><div class="marks {kind}">{marks}</div>{value}</div>'
    )


def _span(kind: str, low: float, high: float) -> str:
    return f'<i class="{kind}" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'


def _plot(kind: str, rows: str, label: str) -> str:
    return f'<div class="plot {kind}" role="img" aria-label="{escape(label)}">{rows}</div>'
