"""Paired differences between two models on the same items, with their uncertainty.

The items of a task are a sample of possible items, and all models answered the same ones, so differences are taken
item by item (eval/resampling.py). They do not cover variation between training runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.resampling import LEAST, LEVEL, Answers, Scores, bounds, draw, p_values
from eval.results import ModelScores, ScorePart, TaskResult
from eval.samples import Floats, Item, as_pairs

AVERAGE = "average"
SIGNIFICANT = 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """How much better `model` is than `other` on a task: positive is better, whichever way the metric points.

    Attributes:
        low, high: 95 % interval of the difference; None where there is none, see `why`.
        p: two-sided, of this pair alone: McNemar's exact test (1947) where the score is the share of right items, else
            the exchange test.
        p_among: corrected for the other rivals that were looked at (max-T); p where there is one.
        high_among: upper end of the interval with the same correction (Bonferroni).
        gained, lost: items that only `model`, or only `other`, gets right (scores more on).
        n: items that all of the models answered.
        why: there is no interval; "" where there is one.
    """

    model: str
    other: str
    task: str
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_among: float | None = None
    high_among: float | None = None
    gained: int = 0
    lost: int = 0
    n: int = 0
    why: str = ""

    @property
    def significant(self) -> bool:
        """At the 5 % level, corrected for the other rivals."""
        return self.p_among is not None and self.p_among < SIGNIFICANT


@dataclass(frozen=True)
class _Leaf:
    """A task with items, and the share of one of its metrics in a score."""

    task: str
    metric: str
    share: float


@dataclass(frozen=True)
class _Term:
    """One summand of a score: `share` times the mean over leaves, which a leaderboard normalises by chance."""

    share: float
    sign: float
    leaves: tuple[_Leaf, ...]
    part: ScorePart | None = None

    def of(self, scores: Scores) -> Floats:
        """Its value in each resample, from those of (task, metric)."""
        mean = np.sum([leaf.share * scores[leaf.task, leaf.metric] for leaf in self.leaves], axis=0)
        found: Floats = self.share * self.sign * (mean if self.part is None else self.part.normalised(mean))
        return found


@dataclass(frozen=True)
class _Score:
    """The terms of a score, for a model and one rival."""

    terms: tuple[_Term, ...]

    @property
    def leaves(self) -> tuple[_Leaf, ...]:
        return tuple(leaf for term in self.terms for leaf in term.leaves)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(leaf.task for leaf in self.leaves))

    @property
    def known(self) -> bool:
        """Whether it is the mean over its items, or over its tasks."""
        return not any(math.isnan(leaf.share) for leaf in self.leaves)

    def of(self, scores: Scores) -> Floats:
        found: Floats = np.sum([term.of(scores) for term in self.terms], axis=0)
        return found

    def counts_items(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is a plain mean with equal weight for every item."""
        each = [leaf.share / sizes[leaf.task] for leaf in self.leaves]
        return len(self.terms) == 1 and all(math.isclose(one, each[0], rel_tol=1e-9) for one in each)


class _NoItems(Exception):
    """The reason why a score cannot be computed from items."""


def differences(model: ModelScores, rivals: Sequence[ModelScores], tasks: Sequence[str]) -> tuple[Difference, ...]:
    """`model` against each of the rivals, on the items that all of them answered.

    Args:
        tasks: one task, or several for the mean of their scores, each counting the same. A group is compared over the
            items of the tasks it is made of.
    """
    label = tasks[0] if len(tasks) == 1 else AVERAGE
    found = [Difference(model.name, other.name, label, _ahead(model, other, tasks)) for other in rivals]
    try:
        scores = [_Score(_terms(model, other, tasks)) for other in rivals]
        answers = _answers((model, *rivals), scores[0].tasks)
    except _NoItems as error:
        return tuple(replace(one, why=str(error)) for one in found)
    signs = {task: _sign(model.tasks[task]) for task in answers}
    return tuple(_uncertain(found, scores, answers, signs))


def difference(model: ModelScores, other: ModelScores, task: str) -> Difference:
    """`model` against one other on one task."""
    return differences(model, [other], [task])[0]


def _uncertain(
    found: Sequence[Difference],
    scores: Sequence[_Score],
    answers: Mapping[str, list[Answers]],
    signs: Mapping[str, float],
) -> list[Difference]:
    """Adds counts, intervals and tests."""
    sizes = {task: len(of[0].table) for task, of in answers.items()}
    known = all(score.known for score in scores)
    why = _why_none(known, sum(sizes.values()))
    draws = draw([each for of in answers.values() for each in of]) if known else None
    tests: Sequence[tuple[float | None, float | None]] = [(None, None)] * len(found)
    if draws is not None:
        tests = p_values([draws.exchanged(place, score.of) for place, score in enumerate(scores, 1)])
    said = []
    for place, (one, score, (p, among)) in enumerate(zip(found, scores, tests, strict=True), 1):
        gained, lost = _steps(answers, signs, place)
        if all(of[0].right_or_wrong for of in answers.values()) and (draws is None or score.counts_items(sizes)):
            p = mcnemar(gained, lost)
            among = p if among is None or len(found) == 1 else max(p, among)
        one = replace(one, p=p, p_among=among, gained=gained, lost=lost, n=sum(sizes.values()), why=why)
        said.append(one if why or draws is None else _with_interval(one, draws.halves(place, score.of), len(found)))
    return said


def _with_interval(one: Difference, halves: Floats, rivals: int) -> Difference:
    low, high = bounds(halves)
    return replace(one, low=low, high=high, high_among=bounds(halves, SIGNIFICANT / rivals)[1])


def _why_none(known: bool, n: int) -> str:
    if not known:
        return "it is neither the mean over its items nor over its tasks"
    if n < LEAST:
        return f"fewer than {LEAST} items cannot show a difference at the 5 % level"
    return ""


def _terms(model: ModelScores, other: ModelScores, tasks: Sequence[str]) -> tuple[_Term, ...]:
    """The terms of the tasks' mean score. Raises _NoItems if it cannot be computed from items."""
    terms: list[_Term] = []
    for task in tasks:
        mine, share = model.tasks[task], 1 / len(tasks)
        if mine.parts:
            terms += [
                _Term(share / len(mine.parts), _sign(mine), _leaves(model, other, part.task, part.metric), part)
                for part in mine.parts
            ]
        else:
            terms.append(_Term(share, _sign(mine), _leaves(model, other, task, mine.metric)))
    return tuple(terms)


def _leaves(model: ModelScores, other: ModelScores, task: str, metric: str) -> tuple[_Leaf, ...]:
    """The tasks with items that one raw score is the mean of, by items or by tasks; NaN for shares if by neither.

    Raises:
        _NoItems: a task without items.
    """
    names = model.tasks[task].leaves(model.tasks)
    single = names == (task,)
    keys = [metric if single else model.tasks[name].metric for name in names]
    if not all(_items(model.tasks[name], key) for name, key in zip(names, keys, strict=True)):
        raise _NoItems("its items have no score of their own")
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


def _answers(models: Sequence[ModelScores], tasks: Sequence[str]) -> dict[str, list[Answers]]:
    """The items of each task that all models answered, by metric, the displayed one first.

    Raises:
        _NoItems: there is none.
    """
    found = {}
    for name in tasks:
        results = [model.tasks[name] for model in models]
        rows = _shared(results)
        if not len(rows[0]) or not all(result.items for result in results):
            raise _NoItems("no item was answered by all models")
        tables = []
        for key in (results[0].metric, *results[0].also):
            pairs = [as_pairs(_items(result, key)) for result in results]
            if all(len(pair) == len(result.doc_ids) for pair, result in zip(pairs, results, strict=True)):
                table = np.hstack([pair[chosen] for pair, chosen in zip(pairs, rows, strict=True)])
                tables.append(Answers(name, key, table))
        found[name] = tables
    return found


def _shared(results: Sequence[TaskResult]) -> list[list[int]]:
    """For each model, the indices of the items that all models answered, in the first one's order."""
    places = [{doc: place for place, doc in enumerate(result.doc_ids)} for result in results]
    docs = [doc for doc in results[0].doc_ids if all(doc in where for where in places)]
    return [[where[doc] for doc in docs] for where in places]


def _ahead(model: ModelScores, other: ModelScores, tasks: Sequence[str]) -> float:
    """The difference of the scores, positive if the model is better."""
    if len(tasks) == 1:
        mine, theirs = model.tasks[tasks[0]], other.tasks[tasks[0]]
        return _sign(mine) * (mine.value - theirs.value)
    means = [sum(each.tasks[name].value for name in tasks) / len(tasks) for each in (model, other)]
    return means[0] - means[1]


def _steps(answers: Mapping[str, list[Answers]], signs: Mapping[str, float], rival: int) -> tuple[int, int]:
    """Items on which the model scores more, and less, than the rival."""
    steps = np.concatenate(
        [signs[task] * (of[0].table[:, 0] - of[0].table[:, 2 * rival]) for task, of in answers.items()]
    )
    return int((steps > 0).sum()), int((steps < 0).sum())


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of as lopsided a split of the items on which two models disagree."""
    n, few = gained + lost, min(gained, lost)
    if not n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
