"""Whether one model is better than another, on the same items: paired differences with their uncertainty.

The items of a task are a sample of what could be asked, and both models answered the same ones. So the difference is
taken item by item and bootstrapped over items (Efron & Tibshirani 1993, ch. 16); right-or-wrong tasks also get
McNemar's exact test (1947) over the items on which the two disagree. Neither says how the models would come out if
they were trained again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.results import Part, TaskResult, Verdicts
from eval.samples import Floats, Item, aggregate, as_pairs

RESAMPLES = 10_000
AVERAGE = "average"
_FEW = 64  # kinds of items; those that are right or wrong for two models are of four
_SEED = 0  # the same intervals every time


@dataclass(frozen=True)
class Difference:
    """How much better `model` is than `other` on a task: positive is better, whichever way the metric points.

    Attributes:
        low, high: 95 % bootstrap interval of the difference; None where the score is not made of single items.
        p: two-sided; McNemar's exact test where the score is the share of right items, else the bootstrap's.
        gained, lost: items that only `model`, or only `other`, gets right (scores more on).
        n: items that both answered.
        why: there is no interval; "" where there is one.
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
    why: str = ""

    @property
    def significant(self) -> bool:
        """At the 5 % level."""
        return self.p is not None and self.p < 0.05


@dataclass(frozen=True)
class _Leaf:
    """A task with items, and how much one metric of it, by its key, counts in a score."""

    task: str
    metric: str
    share: float


@dataclass(frozen=True)
class _Term:
    """One summand of a score: `share` times the mean over leaves, from which a leaderboard takes chance away."""

    share: float
    sign: float
    leaves: tuple[_Leaf, ...]
    part: Part | None = None

    def of(self, scores: Mapping[tuple[str, str], Floats]) -> Floats:
        """Its value in each resample, from those of (task, metric)."""
        mean = np.sum([leaf.share * scores[leaf.task, leaf.metric] for leaf in self.leaves], axis=0)
        found: Floats = self.share * self.sign * (mean if self.part is None else self.part.normalised(mean))
        return found


class _NoInterval(Exception):
    """Why a score cannot be put together from items."""


def difference(model: Verdicts, other: Verdicts, task: str) -> Difference:
    """model against other on one task. A group is compared over the items of the tasks it is made of."""
    mine, theirs = model.tasks[task], other.tasks[task]
    return _difference(model, other, task, _sign(mine) * (mine.value - theirs.value), [task])


def average_difference(model: Verdicts, other: Verdicts, tasks: Sequence[str]) -> Difference:
    """On the mean of the tasks' scores, each task counting the same."""
    means = [sum(each.tasks[name].value for name in tasks) / len(tasks) for each in (model, other)]
    return _difference(model, other, AVERAGE, means[0] - means[1], tasks)


def _difference(model: Verdicts, other: Verdicts, task: str, value: float, tasks: Sequence[str]) -> Difference:
    try:
        terms = [term for name in tasks for term in _terms(model, other, name, 1 / len(tasks))]
        leaves = dict.fromkeys(leaf.task for term in terms for leaf in term.leaves)
        items = {name: _paired(model.tasks[name], other.tasks[name]) for name in leaves}
    except _NoInterval as error:
        return Difference(model.name, other.name, task, value, None, None, None, 0, 0, 0, str(error))
    sides = [(_sign(model.tasks[name]), next(iter(found.values()))) for name, found in items.items()]
    steps = np.concatenate([sign * (pair[:, 0] - pair[:, 2]) for sign, pair in sides])
    gained, lost = int((steps > 0).sum()), int((steps < 0).sum())
    right = all(set(np.unique(pair[:, (0, 2)])) <= {0.0, 1.0} for _, pair in sides)
    low = high = p = None
    why = ""
    if any(math.isnan(leaf.share) for term in terms for leaf in term.leaves):
        why = "it is neither the mean over its items nor over its tasks"
    elif len(steps) < 2:
        why = "there is a single item"
    else:
        low, high, p = _bootstrap(terms, items)
    if right and (why or (len(terms) == 1 and _counts_items(terms[0], items))):
        p = mcnemar(gained, lost)
    return Difference(model.name, other.name, task, value, low, high, p, gained, lost, len(steps), why)


def _counts_items(term: _Term, items: Mapping[str, Any]) -> bool:
    """Whether every item counts the same."""
    each = [leaf.share / len(next(iter(items[leaf.task].values()))) for leaf in term.leaves]
    return all(math.isclose(one, each[0], rel_tol=1e-9) for one in each)


def _terms(model: Verdicts, other: Verdicts, task: str, share: float) -> list[_Term]:
    """What the score of a task is made of. Raises _NoInterval where it is not made of items."""
    mine = model.tasks[task]
    if not mine.parts:
        return [_Term(share, _sign(mine), _leaves(model, other, task, mine.metric))]
    return [
        _Term(share / len(mine.parts), _sign(mine), _leaves(model, other, part.task, part.metric), part)
        for part in mine.parts
    ]


def _leaves(model: Verdicts, other: Verdicts, task: str, metric: str) -> tuple[_Leaf, ...]:
    """The tasks with items that one raw score is the mean of, by items or by tasks; NaN for shares if by neither.

    Raises:
        _NoInterval: a task without items.
    """
    names = model.tasks[task].leaves(model.tasks)
    single = names == (task,)
    keys = [metric if single else model.tasks[name].metric for name in names]
    if not all(_items(model.tasks[name], key) for name, key in zip(names, keys, strict=True)):
        raise _NoInterval("its items have no score of their own")
    if single:
        return (_Leaf(task, metric, 1.0),)
    sizes = [len(model.tasks[name].doc_ids) for name in names]
    for weights in (sizes, [1] * len(names)):
        shares = [weight / sum(weights) for weight in weights]
        if all(
            math.isclose(
                sum(w * one.tasks[n].metrics[key] for w, n, key in zip(shares, names, keys, strict=True)),
                one.tasks[task].metrics[metric],
                rel_tol=1e-6,
                abs_tol=1e-9,
            )
            for one in (model, other)
        ):
            return tuple(map(_Leaf, names, keys, shares))
    return tuple(_Leaf(name, key, math.nan) for name, key in zip(names, keys, strict=True))


def _sign(task: TaskResult) -> float:
    return 1.0 if task.higher_is_better else -1.0


def _items(task: TaskResult, metric: str) -> Sequence[Item]:
    return task.items if metric == task.metric else task.also.get(metric, ())


def _paired(mine: TaskResult, theirs: TaskResult) -> dict[str, Floats]:
    """The items that both answered, by metric, the shown one first.

    (item, 4) each: score and weight of the one model, then of the other.

    Raises:
        _NoInterval: there is none.
    """
    second = {doc: place for place, doc in enumerate(theirs.doc_ids)}
    both = [(place, second[doc]) for place, doc in enumerate(mine.doc_ids) if doc in second]
    if not both or not theirs.items:
        raise _NoInterval("no item was answered by both models")
    rows = [list(side) for side in zip(*both, strict=True)]
    found = {}
    for key in (mine.metric, *mine.also):
        pairs = [as_pairs(_items(task, key)) for task in (mine, theirs)]
        if all(len(pair) == len(task.doc_ids) for pair, task in zip(pairs, (mine, theirs), strict=True)):
            found[key] = np.hstack([pair[row] for pair, row in zip(pairs, rows, strict=True)])
    return found


def _bootstrap(terms: Sequence[_Term], items: Mapping[str, Mapping[str, Floats]]) -> tuple[float, float, float]:
    """(low, high, p) of the difference; items are drawn again within each task, since the tasks are no sample.

    items: of each task and metric; every metric of a task and both models get the same draws.
    """
    rng = np.random.default_rng(_SEED)
    scores: tuple[dict[tuple[str, str], Floats], ...] = ({}, {})
    for task, tables in items.items():
        sums = _resampled(np.hstack(list(tables.values())), rng)
        for place, metric in enumerate(tables):
            for side, of in enumerate(scores):
                score, weight = sums[:, 4 * place + 2 * side], sums[:, 4 * place + 2 * side + 1]
                of[task, metric] = aggregate(metric.partition(",")[0], score, weight)
    differences: Floats = np.sum([term.of(scores[0]) - term.of(scores[1]) for term in terms], axis=0)
    low, high = np.quantile(differences, (0.025, 0.975))
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))


def _resampled(table: Floats, rng: np.random.Generator) -> Floats:
    """(item, column) -> (RESAMPLES, column): sums over as many items, drawn with replacement."""
    n, width = table.shape
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    if len(kinds) <= _FEW:
        # Drawing items again is drawing how often each kind occurs: the same law, without n draws.
        found: Floats = rng.multinomial(n, counts / n, RESAMPLES) @ kinds
        return found
    step = max(1, 1_000_000 // (n * width))  # resamples at once: 8 MB of numbers
    starts = range(0, RESAMPLES, step)
    return np.concatenate([table[rng.integers(0, n, (min(step, RESAMPLES - s), n))].sum(axis=1) for s in starts])


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as lopsided a split of the items on which two models disagree."""
    n, few = gained + lost, min(gained, lost)
    if not n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
