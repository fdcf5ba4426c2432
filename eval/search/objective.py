"""From the scores of a candidate to the numbers that a search maximises.

mean    the mean of the tasks' scores, each counting the same or by given weights
worst   the score of the worst task
gain    the mean over tasks of the gain over the task's best parent, relative to that parent's score: a common scale
        for scores that have none
pareto  every task is an objective of its own

A constraint bounds how far any task may fall below a reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from eval.samples import Floats, Item, aggregate, as_pairs
from eval.search.stopping import LEVEL, Rounds, evidence
from merge.errors import UsageError

GoalKind = Literal["mean", "worst", "gain", "pareto"]
GOALS: tuple[GoalKind, ...] = ("mean", "worst", "gain", "pareto")


@dataclass(frozen=True)
class TaskScore:
    """One model on some items of one task.

    Attributes:
        value: the task's score on these items.
        items: item -> its score; {} where the task is scored as a whole.
        metric: lm-eval's word for it, without the filter.
    """

    value: float
    items: Mapping[int, Item] = field(default_factory=dict)
    metric: str = ""
    higher_is_better: bool = True

    @property
    def signed(self) -> float:
        """More is better."""
        return self.value if self.higher_is_better else -self.value

    @property
    def is_share(self) -> bool:
        return self.higher_is_better and 0.0 <= self.value <= 1.0

    @property
    def bounded(self) -> bool:
        """Whether every item scores between 0 and 1, and counts the same."""
        return all(isinstance(item, float) and 0.0 <= item <= 1.0 for item in self.items.values())

    def joined(self, other: TaskScore) -> TaskScore:
        """With further items."""
        items = {**self.items, **other.items}
        sums = as_pairs(list(items.values())).sum(axis=0)
        return TaskScore(float(aggregate(self.metric, *sums)), items, self.metric, self.higher_is_better)

    def plain(self) -> dict[int, float]:
        """item -> its score, more is better; of a loss over words or bytes, the loss."""
        sign = 1.0 if self.higher_is_better else -1.0
        return {place: sign * (item[0] if isinstance(item, tuple) else item) for place, item in self.items.items()}


Scores = Mapping[str, TaskScore]


@dataclass(frozen=True)
class SearchGoal:
    """
    Attributes:
        weights: of the tasks, for mean and gain; those that are not named have 1.
        max_fall: no task may be worse than `reference` by more than this, in the task's unit; None: no constraint.
        parents: the best parent's score of each task, more is better; for `gain`.
        reference: the scores that may not fall.
        of_raw: weights are of the scores as they are, so that of a loss they are negative (mergekit-evolve).
    """

    goal: GoalKind = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    max_fall: float | None = None
    parents: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    of_raw: bool = False

    def turned(self, scores: Scores) -> SearchGoal:
        """With weights of scores of which more is better."""
        if not self.of_raw:
            return self
        weights = {task: self.weights.get(task, 1.0) for task in scores}
        signs = {task: 1.0 if score.higher_is_better else -1.0 for task, score in scores.items()}
        return replace(self, weights={task: signs[task] * weight for task, weight in weights.items()}, of_raw=False)

    def check(self, scores: Scores) -> None:
        """Raises UsageError for scores that the goal has no use for."""
        if unknown := [task for task in self.weights if task not in scores]:
            raise UsageError(f"a weight is given to {unknown[0]}, which is no task; there are: {', '.join(scores)}.")
        alike = all(score.is_share for score in scores.values())
        if self.goal in ("mean", "worst") and len(scores) > 1 and not alike and not self.weights:
            raise UsageError(
                f"the scores of {', '.join(scores)} have no common scale. Use --goal gain or pareto, or name one task."
            )

    def names(self, tasks: Sequence[str]) -> tuple[str, ...]:
        return tuple(tasks) if self.goal == "pareto" else (self.goal if len(tasks) > 1 else tasks[0],)

    def values(self, scores: Scores) -> tuple[float, ...]:
        """What is maximised: one number, or one for each task."""
        signed = {task: score.signed for task, score in scores.items()}
        if self.goal == "pareto":
            return tuple(signed.values())
        if self.goal == "worst":
            return (min(signed.values()),)
        shift = self.parents if self.goal == "gain" else {}
        shares = self.shares(tuple(signed))
        return (sum(share * (signed[task] - shift.get(task, 0.0)) for task, share in shares.items()),)

    def shares(self, tasks: Sequence[str]) -> dict[str, float]:
        """The factor of each task's score in the value."""
        total = sum(abs(self.weights.get(task, 1.0)) for task in tasks)
        shares = {task: self.weights.get(task, 1.0) / total for task in tasks}
        if self.goal == "gain":
            shares = {task: share / (abs(self.parents.get(task, 0.0)) or 1.0) for task, share in shares.items()}
        return shares

    def violation(self, scores: Scores) -> float:
        """By how much the constraint is broken: 0 or less where it is not."""
        if self.max_fall is None:
            return 0.0
        return max(self.reference[task] - score.signed for task, score in scores.items()) - self.max_fall


@dataclass(frozen=True)
class Duel:
    """A candidate against the best one so far, on the rounds that it was asked.

    Attributes:
        evidence: against its being at least as good; it is stopped at 1 / LEVEL.
        value: its estimated value: that of the best one, and the difference on the same items.
    """

    evidence: float
    value: float

    @property
    def lost(self) -> bool:
        return self.evidence >= 1 / LEVEL


def duel(objective: SearchGoal, rounds: Rounds, candidate: Scores, best: Scores, asked: int) -> Duel:
    """After `asked` rounds. Where items have no bounds, the sign of a round's loss counts: the hypothesis is then that
    the candidate is worse in no more than half of the rounds."""
    mine = {task: rounds.terms(task, score.plain(), asked) for task, score in candidate.items()}
    theirs = {task: rounds.terms(task, best[task].plain(), asked) for task in candidate}
    value = objective.values(best)[0]
    n = len(rounds.parts)
    bounded = all(score.bounded for score in (*candidate.values(), *best.values()))
    if objective.goal == "worst" and bounded and len(candidate) > 1:
        return Duel(_worst(rounds, mine, theirs), min(float(terms.mean()) for terms in mine.values()))
    shares = objective.shares(tuple(candidate))
    losses = np.sum([share * (theirs[task] - mine[task]) for task, share in shares.items()], axis=0)
    most = sum(abs(share) * rounds.largest(task) for task, share in shares.items())
    found = evidence(losses / most if bounded else np.sign(losses), n)
    return Duel(found, value - float(losses.mean()))


def _worst(rounds: Rounds, mine: Mapping[str, Floats], theirs: Mapping[str, Floats]) -> float:
    """Against the worst task's being at least as good as the best one's worst task.

    Under the hypothesis each of my tasks is at least as good as their worst one, whichever it is. So the least of a
    task's evidence against all of theirs counts; the largest of these, divided by their number, for there are several.
    """
    n = len(rounds.parts)
    each = []
    for task, terms in mine.items():
        most = {other: max(rounds.largest(task), rounds.largest(other)) for other in theirs}
        each.append(min(evidence((theirs[other] - terms) / most[other], n) for other in theirs))
    return max(each) / len(each)
