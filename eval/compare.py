"""Whether one model is better than another, on the same items: paired differences with their uncertainty.

The items of a task are a sample of what could be asked, and both models answered the same ones. So the difference is
taken item by item and bootstrapped over items (Efron & Tibshirani 1993, ch. 16); right-or-wrong tasks also get
McNemar's exact test (1947) over the items on which the two disagree. Neither says how the models would come out if
they were trained again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eval.results import Results, TaskResult, Verdicts
from merge.errors import UsageError

RESAMPLES = 10_000
_SEED = 0  # the same intervals every time


@dataclass(frozen=True)
class Difference:
    """How much better `model` is than `other` on a task: positive is better, whichever way the metric points.

    Attributes:
        low, high: 95 % bootstrap interval of the difference; None where single items have no score.
        p: two-sided; McNemar's exact test for right-or-wrong items, else the bootstrap's.
        gained, lost: items that only `model`, or only `other`, gets right (scores more on).
        n: items that both answered.
    """

    model: str
    other: str
    task: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    gained: int
    lost: int
    n: int

    @property
    def significant(self) -> bool:
        """At the 5 % level."""
        return self.p is not None and self.p < 0.05


def difference(model: Verdicts, other: Verdicts, task: str, subtasks: Sequence[str] = ()) -> Difference:
    """model against other on one task; a group is compared over the items of its subtasks."""
    mine, theirs = model.tasks[task], other.tasks[task]
    sign = 1.0 if mine.higher_is_better else -1.0
    value = sign * (mine.value - theirs.value)
    pairs = [_paired(model.tasks[name], other.tasks[name]) for name in (subtasks or (task,))]
    a, b = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    if not len(a):
        return Difference(model.name, other.name, task, value, None, None, None, 0, 0, 0)
    gained, lost = int((sign * (a - b)[:, 0] > 0).sum()), int((sign * (a - b)[:, 0] < 0).sum())
    low, high, p = _bootstrap(a, b, sign)
    if set(np.unique(a[:, 0])) | set(np.unique(b[:, 0])) <= {0.0, 1.0}:
        p = mcnemar(gained, lost)
    return Difference(model.name, other.name, task, value, low, high, p, gained, lost, len(a))


def _paired(mine: TaskResult, theirs: TaskResult) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(n, 2) each: score and weight of the items that both have."""
    first = {doc: _pair(item) for doc, item in zip(mine.doc_ids, mine.items, strict=True)}
    second = {doc: _pair(item) for doc, item in zip(theirs.doc_ids, theirs.items, strict=True)}
    both = [doc for doc in first if doc in second]
    empty = np.empty((0, 2))
    if not both:
        return empty, empty
    return np.array([first[doc] for doc in both]), np.array([second[doc] for doc in both])


def _pair(item: float | tuple[float, float]) -> tuple[float, float]:
    return item if isinstance(item, tuple) else (item, 1.0)


def _bootstrap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], sign: float) -> tuple[float, float, float]:
    """(low, high, p) of the difference of the weighted means, over resampled items."""
    rng = np.random.default_rng(_SEED)
    n = len(a)
    differences = np.empty(RESAMPLES)
    step = max(1, 4_000_000 // n)  # resamples at once: 32 MB of indices
    for start in range(0, RESAMPLES, step):
        rows = rng.integers(0, n, (min(step, RESAMPLES - start), n))
        differences[start : start + step] = sign * (_mean(a, rows) - _mean(b, rows))
    low, high = np.quantile(differences, (0.025, 0.975))
    tail = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
    return float(low), float(high), min(1.0, 2 * max(tail, 1 / RESAMPLES))


def _mean(items: npt.NDArray[np.float64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    scores, weights = items[:, 0][rows].sum(axis=1), items[:, 1][rows].sum(axis=1)
    found: npt.NDArray[np.float64] = scores / weights
    return found


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as lopsided a split of the items on which two models disagree."""
    n, few = gained + lost, min(gained, lost)
    if not n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def parents(results: Results, model: Verdicts) -> list[Verdicts]:
    """The models among the results that a merge was made of; [] if none of them was judged."""
    found = []
    for text in model.parents:
        path = str(Path(text).resolve())
        same = [other for other in results.models if other is not model and path == other.path]
        near = [other for other in results.models if other is not model and text in (other.text, other.name)]
        named = [other for other in results.models if other is not model and other.name == Path(text).name]
        found += (same or near or named)[:1]
    return list({other.name: other for other in found}.values())


@dataclass(frozen=True)
class Gain:
    """A merge against its parents on one task; `best` is the difference to the best of them."""

    model: str
    task: str
    best: Difference
    over_mean: float  # over the mean of the parents' scores; positive is better


def gains(results: Results, model: Verdicts, rivals: Sequence[Verdicts]) -> list[Gain]:
    found = []
    for task in results.tasks:
        mine = model.tasks[task]
        sign = 1.0 if mine.higher_is_better else -1.0
        values = [rival.tasks[task].value for rival in rivals]
        best = max(rivals, key=lambda rival: sign * rival.tasks[task].value)
        subtasks = [name for name, part in model.tasks.items() if part.group == task]
        over_mean = sign * (mine.value - sum(values) / len(values))
        found.append(Gain(model.name, task, difference(model, best, task, subtasks), over_mean))
    return found


def pick(results: Results, name: str) -> Verdicts:
    """Raises UsageError for a model that was not judged."""
    for model in results.models:
        if name in (model.name, model.text):
            return model
    raise UsageError(f'no results for "{name}"; there are: {", ".join(model.name for model in results.models)}.')
