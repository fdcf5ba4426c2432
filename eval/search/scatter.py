"""Plots of a search as SVG: points, with a curve and levels, and a map of a value over two places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from eval.plots import tick_step

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 18, 40


@dataclass(frozen=True)
class Mark:
    """A point. `role`: a class of the style sheet; `title`: what is shown when a pointer rests on it."""

    x: float
    y: float
    role: str
    title: str


@dataclass(frozen=True)
class _Axis:
    """From numbers to pixels, with rounded ends."""

    low: float
    high: float
    step: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def of(values: Sequence[float], start: float, end: float, log: bool = False) -> _Axis:
        used = [math.log10(value) for value in values] if log else list(values)
        low, high = min(used), max(used)
        step = tick_step((high - low) or abs(high) or 1.0)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return _Axis(low, high if high > low else low + step, step, start, end, log)

    def at(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        numbers = [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]
        said = [10**number if self.log else number for number in numbers]
        return [(self.at(value), f"{value:.4g}") for value in said]


def scatter(
    marks: Sequence[Mark],
    across: str,
    up: str,
    label: str,
    *,
    curve: Sequence[tuple[float, float]] = (),
    levels: Sequence[tuple[float, str]] = (),
    words: Sequence[str] = (),
    log: bool = False,
) -> str:
    """Points over two axes.

    Args:
        across, up: the names of the axes; label: what a screen reader says.
        curve: a line through these points.
        levels: dashed horizontal lines, with their names.
        words: of the numbers 0, 1 ... across, where these are choices.
    """
    ys = [*(mark.y for mark in marks), *(y for y, _ in levels), *(y for _, y in curve)]
    vertical = _Axis.of(ys, HEIGHT - _BOTTOM, _TOP)
    start, end = _LEFT, WIDTH - _RIGHT
    if words:
        horizontal = _Axis(-0.5, len(words) - 0.5, 1.0, start, end)
        ticks = [(horizontal.at(i), word if len(word) <= 14 else word[:13] + "…") for i, word in enumerate(words)]
    else:
        horizontal = _Axis.of([mark.x for mark in marks], start, end, log)
        ticks = horizontal.ticks
    parts = _frame(ticks, vertical, across, up)
    for y, name in levels:
        place = vertical.at(y)
        parts.append(f'<line class="chord" x1="{start}" y1="{place:.1f}" x2="{end}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{end}" y="{place - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    if len(curve) > 1:
        points = " ".join(f"{horizontal.at(x):.1f},{vertical.at(y):.1f}" for x, y in curve)
        parts.append(f'<polyline class="curve" points="{points}"/>')
    for mark in marks:
        title = f"<title>{escape(mark.title)}: {mark.y:.4g}</title>"
        centre = f'cx="{horizontal.at(mark.x):.1f}" cy="{vertical.at(mark.y):.1f}"'
        parts.append(f'<circle class="{mark.role}" {centre} r="4">{title}</circle>')
    return _svg(parts, label)


def heat(
    xs: Sequence[str], ys: Sequence[str], values: Sequence[Sequence[float | None]], across: str, up: str, label: str
) -> str:
    """Cells, darker where the value is larger; values[row][column], rows from below."""
    known = [value for row in values for value in row if value is not None]
    low, span = min(known), (max(known) - min(known)) or 1.0
    width, height = (WIDTH - _LEFT - _RIGHT) / len(xs), (HEIGHT - _TOP - _BOTTOM) / len(ys)
    parts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / span
            x, y = _LEFT + j * width, HEIGHT - _BOTTOM - (i + 1) * height
            place = f'x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"'
            title = f"<title>{escape(xs[j])}, {escape(ys[i])}: {value:.4g}</title>"
            parts.append(f'<rect class="merge" {place} opacity="{0.08 + 0.92 * share:.3f}">{title}</rect>')
            if width > 34:
                where = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
                ink = ' style="fill:var(--page)"' if share > 0.5 else ""
                parts.append(f'<text {where} text-anchor="middle"{ink}>{value:.3g}</text>')
    ticks = [(_LEFT + (j + 0.5) * width, text) for j, text in enumerate(xs)]
    for i, text in enumerate(ys):
        y = HEIGHT - _BOTTOM - (i + 0.5) * height + 4
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>')
    parts += _below(ticks, across)
    parts.append(_upright(up))
    return _svg(parts, label)


def _frame(ticks: Sequence[tuple[float, str]], vertical: _Axis, across: str, up: str) -> list[str]:
    parts = []
    for place, said in vertical.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{place:.1f}" x2="{WIDTH - _RIGHT}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{said}</text>')
    return [*parts, *_below(ticks, across), _upright(up)]


def _below(ticks: Sequence[tuple[float, str]], across: str) -> list[str]:
    y = HEIGHT - _BOTTOM + 16
    parts = [
        f'<text class="tick" x="{place:.1f}" y="{y}" text-anchor="middle">{escape(said)}</text>'
        for place, said in ticks
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return [*parts, f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>']


def _upright(up: str) -> str:
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    return f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(up)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    inner = "".join(parts)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{inner}</svg>'
    return f'<div class="plot" role="img" aria-label="{escape(label)}">{picture}</div>'
