"""The plots of the page as SVG: bars with error bars, intervals, strips of items, lines.

Every plot is WIDTH units wide, about a phone's screen, so that its text has the size of the page's text everywhere.
Colours are classes of the page's style sheet: light and dark are settled there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH = 340
_LABEL = 92  # units for names of models at the left
_TASK = 122  # for names of tasks
_LETTER = 7.0  # units
_ROW = 24


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
        label: what a screen reader says.
        full: the value at the right end; None: a little more than the largest.
    """
    top = full or 1.05 * max(max(row.ends[1] for row in rows), 1e-12)
    room = WIDTH - _LABEL - 78
    parts = []
    for number, row in enumerate(rows):
        y = number * _ROW
        length = room * min(max(row.value / top, 0), 1)
        parts.append(_name(row.name, y + 16))
        parts.append(f'<rect class="track" x="{_LABEL}" y="{y + 4}" width="{room}" height="16" rx="2"/>')
        parts.append(f'<rect class="{row.role}" x="{_LABEL}" y="{y + 4}" width="{length:.1f}" height="16" rx="2"/>')
        if row.ends[0] < row.ends[1]:
            low, high = (room * min(max(end / top, 0), 1) for end in row.ends)
            parts.append(_whisker(_LABEL + low, _LABEL + high, y + 12))
        parts.append(f'<text class="value" x="{WIDTH}" y="{y + 16}" text-anchor="end">{escape(row.said)}</text>')
    return _svg(parts, len(rows) * _ROW, label)


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
    step = tick_step(high - low, 6 if percent else 4)  # numbers like +0.015 are wide
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step
    left, right = _TASK + 10, WIDTH - 18  # room for half of the last number

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = len(rows) * _ROW
    parts = []
    for number in range(round((high - low) / step) + 1):
        tick = low + number * step
        x = place(tick)
        kind = "zero" if abs(tick) < step / 2 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{bottom + 4}"/>')
        said = f"{100 * tick:+.4g}" if percent else f"{tick:+.4g}"
        text = "0" if kind == "zero" else said
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(rows):
        y = number * _ROW + 12
        parts.append(_name(row.name, y + 4, _TASK))
        if row.low is not None and row.high is not None:
            span = f'x1="{place(row.low):.1f}" y1="{y}" x2="{place(row.high):.1f}" y2="{y}"'
            parts.append(f'<line class="span {row.role}" {span}/>')
        parts.append(f'<circle class="{row.role}" cx="{place(row.value):.1f}" cy="{y}" r="5"/>')
    return _svg(parts, bottom + 24, label)


def strips(rows: Sequence[tuple[str, Sequence[bool], str]], label: str) -> str:
    """(name, right or wrong for each item, role) in each row; all have the items in one order."""
    room = WIDTH - _LABEL
    parts = []
    for number, (name, right, role) in enumerate(rows):
        y = number * 20
        parts.append(_name(name, y + 13))
        parts.append(f'<rect class="wrong" x="{_LABEL}" y="{y + 1}" width="{room}" height="16"/>')
        unit = room / max(len(right), 1)
        runs, start = [], 0
        for kind, run in groupby(right):
            length = len(list(run))
            if kind:
                runs.append(f"M{_LABEL + start * unit:.2f} {y + 1}h{length * unit:.2f}v16h-{length * unit:.2f}z")
            start += length
        if runs:
            parts.append(f'<path class="{role}" d="{"".join(runs)}"/>')
    return _svg(parts, len(rows) * 20, label)


def line(xs: Sequence[float], ys: Sequence[float], ends: tuple[str, str], label: str, percent: bool) -> str:
    """ys over xs from 0 to 1, with the straight line between the ends dashed."""
    low, high = min(ys), max(ys)
    step = tick_step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    high = high if high > low else low + step
    left, right, top, bottom = 44, WIDTH - 10, 8, 168

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
    for name, x, anchor in ((ends[0], left, "start"), (ends[1], right, "end")):
        parts.append(f'<text class="name" x="{x}" y="{bottom + 20}" text-anchor="{anchor}">{_short(name, 20)}</text>')
    return _svg(parts, bottom + 26, label)


def tick_step(span: float, most: int = 6) -> float:
    """1, 2 or 5 times a power of ten, for up to `most` steps."""
    if span <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    return next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= most)


def _name(name: str, y: float, room: int = _LABEL) -> str:
    letters = int((room - 8) / _LETTER)
    return f'<text class="name" x="{room - 8}" y="{y}" text-anchor="end">{_short(name, letters)}</text>'


def _short(name: str, letters: int) -> str:
    if len(name) <= letters:
        return escape(name)
    return f"<title>{escape(name)}</title>{escape(name[: letters - 1])}…"


def _whisker(low: float, high: float, y: float) -> str:
    ends = f"M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
    return f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}{ends}"/>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
