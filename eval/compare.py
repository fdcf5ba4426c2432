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
from eval.samples import Floats, aggregate, as_pairs
from merge.errors import UsageError

RESAMPLES = 10_000
AVERAGE = "average"
_FEW = 64  # different differences; right-or-wrong items have three
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


@dataclass(frozen=True)
class _Part:
    """The items of one task that two models answered, (item, 2) each: score and weight; and what the part counts."""

    metric: str
    sign: float
    a: Floats
    b: Floats
    share: float


def difference(model: Verdicts, other: Verdicts, task: str) -> Difference:
    """model against other on one task. A group is compared over the items of the tasks it is made of."""
    mine, theirs = model.tasks[task], other.tasks[task]
    value = _sign(mine) * (mine.value - theirs.value)
    leaves = mine.leaves(model.tasks)
    return _difference(model, other, task, value, _parts(model, other, leaves, (mine.value, theirs.value)))


def average_difference(model: Verdicts, other: Verdicts, tasks: Sequence[str]) -> Difference:
    """On the mean of the tasks' scores, each task counting the same."""
    means = [sum(each.tasks[name].value for name in tasks) / len(tasks) for each in (model, other)]
    parts: list[_Part] = []
    for name in tasks:
        mine, theirs = model.tasks[name], other.tasks[name]
        found = _parts(model, other, mine.leaves(model.tasks), (mine.value, theirs.value))
        parts += [_Part(part.metric, part.sign, part.a, part.b, part.share / len(tasks)) for part in found]
    return _difference(model, other, AVERAGE, means[0] - means[1], parts)


def _difference(model: Verdicts, other: Verdicts, task: str, value: float, parts: Sequence[_Part]) -> Difference:
    if not parts or not all(len(part.a) for part in parts):
        return Difference(model.name, other.name, task, value, None, None, None, 0, 0, 0)
    steps = np.concatenate([part.sign * (part.a - part.b)[:, 0] for part in parts])
    gained, lost = int((steps > 0).sum()), int((steps < 0).sum())
    low = high = p = None
    if not any(math.isnan(part.share) for part in parts):
        low, high, p = _bootstrap(parts)
    if task != AVERAGE and all(set(np.unique(side[:, 0])) <= {0.0, 1.0} for part in parts for side in (part.a, part.b)):
        p = mcnemar(gained, lost)
    return Difference(model.name, other.name, task, value, low, high, p, gained, lost, len(steps))


def _parts(model: Verdicts, other: Verdicts, leaves: Sequence[str], values: tuple[float, float]) -> list[_Part]:
    """The tasks that make up one score; NaN for their shares where neither equal ones nor the items' give that score.

    values: the scores of both models.
    """
    found = []
    for name in leaves:
        mine, theirs = model.tasks[name], other.tasks[name]
        found.append(_Part(mine.metric.partition(",")[0], _sign(mine), *_paired(mine, theirs), 1.0))
    n = sum(len(part.a) for part in found)
    by_size = [len(part.a) / max(n, 1) for part in found]
    for shares in (by_size, [1.0 / len(found)] * len(found)):
        made = [
            sum(share * each.tasks[name].value for share, name in zip(shares, leaves, strict=True))
            for each in (model, other)
        ]
        if all(math.isclose(one, value, rel_tol=1e-6, abs_tol=1e-9) for one, value in zip(made, values, strict=True)):
            return [_Part(p.metric, p.sign, p.a, p.b, share) for p, share in zip(found, shares, strict=True)]
    return [_Part(part.metric, part.sign, part.a, part.b, math.nan) for part in found]


def _sign(task: TaskResult) -> float:
    return 1.0 if task.higher_is_better else -1.0


def _paired(mine: TaskResult, theirs: TaskResult) -> tuple[Floats, Floats]:
    """The items that both have."""
    first = dict(zip(mine.doc_ids, as_pairs(mine.items), strict=True))
    second = dict(zip(theirs.doc_ids, as_pairs(theirs.items), strict=True))
    both = [doc for doc in first if doc in second]
    empty = np.empty((0, 2))
    return (np.array([first[doc] for doc in both]), np.array([second[doc] for doc in both])) if both else (empty, empty)


def _bootstrap(parts: Sequence[_Part]) -> tuple[float, float, float]:
    """(low, high, p) of the difference; items are drawn again within each task, since the tasks are no sample."""
    rng = np.random.default_rng(_SEED)
    differences = np.zeros(RESAMPLES)
    for part in parts:
        n = len(part.a)
        steps, counts = np.unique(part.a[:, 0] - part.b[:, 0], return_counts=True)
        if not part.metric.endswith(("perplexity", "_per_byte")) and len(steps) <= _FEW:
            # Drawing items again is drawing how often each difference occurs: the same law, without n draws.
            differences += part.share * part.sign * (rng.multinomial(n, counts / n, RESAMPLES) @ steps) / n
            continue
        step = max(1, 1_000_000 // n)  # resamples at once: 8 MB of indices
        for start in range(0, RESAMPLES, step):
            rows = rng.integers(0, n, (min(step, RESAMPLES - start), n))
            gap = _score(part.metric, part.a, rows) - _score(part.metric, part.b, rows)
            differences[start : start + step] += part.share * part.sign * gap
    low, high = np.quantile(differences, (0.025, 0.975))
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))


def _score(metric: str, items: Floats, rows: npt.NDArray[np.int64]) -> Floats:
    found: Floats = aggregate(metric, items[:, 0][rows].sum(axis=1), items[:, 1][rows].sum(axis=1))
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
    """A merge against its parents on one task.

    Attributes:
        task: or AVERAGE.
        best: the difference to the best of the parents on it.
        over_mean: over the mean of the parents' scores; positive is better.
        each: the differences to all parents, in their order.
    """

    model: str
    task: str
    best: Difference
    over_mean: float
    each: tuple[Difference, ...]


def gains(results: Results, model: Verdicts, rivals: Sequence[Verdicts]) -> list[Gain]:
    """On each task, and on their average where there is one."""
    found = [_gain(model, [difference(model, rival, task) for rival in rivals], task) for task in results.tasks]
    if has_average(results):
        found.append(_gain(model, [average_difference(model, rival, results.tasks) for rival in rivals], AVERAGE))
    return found


def _gain(model: Verdicts, each: Sequence[Difference], task: str) -> Gain:
    best = min(each, key=lambda one: one.value)  # the least ahead of: the best of the others
    return Gain(model.name, task, best, sum(one.value for one in each) / len(each), tuple(each))


def is_share(task: TaskResult) -> bool:
    """Whether a score is a share of 1, shown in percent."""
    return task.higher_is_better and 0.0 <= task.value <= 1.0


def has_average(results: Results) -> bool:
    """Only scores of one scale can be averaged."""
    return len(results.tasks) > 1 and all(
        is_share(model.tasks[name]) for model in results.models for name in results.tasks
    )


def average(results: Results, model: Verdicts) -> float:
    """Mean of the tasks' scores, each counting the same."""
    return sum(model.tasks[name].value for name in results.tasks) / len(results.tasks)


def average_error(results: Results, model: Verdicts) -> float | None:
    """Standard error of the average; the tasks' items are drawn independently."""
    errors = [model.tasks[name].error for name in results.tasks]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def pick(results: Results, name: str) -> Verdicts:
    """Raises UsageError for a model that was not judged."""
    for model in results.models:
        if name in (model.name, model.text):
            return model
    raise UsageError(f'no results for "{name}"; there are: {", ".join(model.name for model in results.models)}.')


@dataclass(frozen=True)
class Comparison:
    """A merge, its parents, and the gains; what pages and tables are made from."""

    results: Results
    merge: Verdicts | None
    parents: tuple[Verdicts, ...] = ()
    gains: tuple[Gain, ...] = ()


def compare(results: Results, merge: str | None = None, named: Sequence[str] = ()) -> Comparison:
    """Finds the merge and its parents, if they are not named, by what the merge's manifest or recipe says.

    Args:
        merge: its name; where none is given, the one merge whose parents are here too.
        named: the parents' names.

    Raises:
        UsageError: a name that no model has; parents without a merge; several merges and none named.
    """
    chosen = [pick(results, merge)] if merge else _merges(results, named)
    if not chosen or (results.path and not merge):  # the points of a path are no rivals
        return Comparison(results, None)
    if len(chosen) > 1:
        raise UsageError(f"several merges: {', '.join(model.name for model in chosen)}. Name one: --merge NAME.")
    rivals = [pick(results, name) for name in named] or parents(results, chosen[0])
    rivals = [rival for rival in rivals if rival is not chosen[0]]
    if not rivals:
        others = ", ".join(model.name for model in results.models if model is not chosen[0]) or "no other model"
        raise UsageError(f"no parent of {chosen[0].name} is among {others}. Name them: --parents A,B.")
    return Comparison(results, chosen[0], tuple(rivals), tuple(gains(results, chosen[0], rivals)))


def _merges(results: Results, named: Sequence[str]) -> list[Verdicts]:
    if named:
        rivals = [pick(results, name) for name in named]
        others = [model for model in results.models if model not in rivals]
        known = [model for model in others if model.parents]
        return known if len(known) == 1 else others
    return [model for model in results.models if parents(results, model)]
