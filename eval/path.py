"""Evaluates 11 points on the straight line between two models, and computes the barrier between them.

Two models lie in one basin if no point between them is much worse than they are. The barrier is the largest excess of
the loss over the line between the ends' losses; Frankle et al. 2020 (Linear mode connectivity and the lottery ticket
hypothesis, arXiv:1912.05671, section 2) take the mean of the ends in place of that line, which is the same where both
ends are equally good; the line is that of Entezari et al. 2022 (arXiv:2110.06296, section 2). For scores where more is
better the loss is the score with its sign turned, so that for an accuracy it is the error up to a constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.blends import blend, on_disk, short_names
from eval.compare import in_percent
from eval.models import Subject
from eval.results import Results
from eval.settings import Settings
from eval.tables import score_table, shown
from merge.errors import UsageError

POINTS = 11
_WIDTH = 40  # of a bar in the terminal


@dataclass(frozen=True)
class Barrier:
    """`height`: of the loss over the line between the ends, 0 or more; `at`: where; `best`: where the score is best."""

    task: str
    height: float
    at: float
    best: float
    percent: bool


def judge_path(
    models: Sequence[str],
    judge: Callable[[Sequence[Subject], Settings], Results],
    how: Settings,
    keep: Path | None = None,
) -> Results:
    """Every point of the line from the first model to the second.

    Args:
        judge: evaluates subjects.
        keep: where ends stay that are recipes.

    Raises:
        UsageError: not two models.
    """
    if len(models) != 2:
        raise UsageError(f"--path: expected two models, found {len(models)}.")
    places = [step / (POINTS - 1) for step in range(POINTS)]
    with on_disk(models, "--path", keep) as (first, last):
        inner = [blend((first.text, last.text), (1 - t, t), f"t = {t:.1f}") for t in places[1:-1]]
        results = judge([first, *inner, last], how)
    return dataclasses.replace(results, path=tuple(places))


def barrier(results: Results, task: str) -> Barrier:
    values = [model.tasks[task].value for model in results.models]
    sign = -1.0 if results.models[0].tasks[task].higher_is_better else 1.0
    losses = [sign * value for value in values]
    excess = [loss - ((1 - t) * losses[0] + t * losses[-1]) for t, loss in zip(results.path, losses, strict=True)]
    excess[0] = excess[-1] = 0.0  # exactly, without rounding
    top = max(range(len(excess)), key=excess.__getitem__)
    best = min((0, len(losses) - 1, *range(len(losses))), key=losses.__getitem__)  # among equals, an end
    percent = in_percent(results, task)
    return Barrier(task, max(0.0, excess[top]), results.path[top], results.path[best], percent)


def barrier_text(found: Barrier, ends: Sequence[str]) -> str:
    size = shown(found.height, found.percent)
    if found.height > 0:
        text = f"{found.task}: barrier {size} at t = {found.at:.1f}"
    else:
        text = f"{found.task}: no barrier: no point is worse than the line between the ends"
    if 0 < found.best < 1:
        return text + f"; best at t = {found.best:.1f}, better than both ends"
    return text + f"; best at an end, {ends[0] if found.best == 0 else ends[1]}"


def print_path(results: Results) -> None:
    """The table, a bar for each point of each task, and the barriers."""
    from merge.show.terminal import console, show_table

    out = console()
    show_table(score_table(results, out.width), out)
    ends = short_names([results.models[0].name, results.models[-1].name])
    for task in results.tasks:
        out.print(barrier_text(barrier(results, task), ends))
        for t, value, bar in _bars(results, task):
            out.print(f"  t = {t:.1f}  {value}  {bar}")


def _bars(results: Results, task: str) -> list[tuple[float, str, str]]:
    """Bars that start at the smallest value, so that small differences are visible."""
    values = [model.tasks[task].value for model in results.models]
    low, high = min(values), max(values)
    percent = in_percent(results, task)
    scale = (high - low) or 1.0
    said = [f"{100 * value:6.1f}" if percent else f"{value:8.4f}" for value in values]
    filled = [1 + math.floor((value - low) / scale * (_WIDTH - 1)) for value in values]
    return [(t, text, "█" * n) for t, text, n in zip(results.path, said, filled, strict=True)]
