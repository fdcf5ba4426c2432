"""Stops a candidate early that is worse than the best one so far, by a test that is valid however often it looks.

A candidate is asked a few items first, then more. The items of a search are a finite list; each candidate gets them in
a random order of its own, in rounds that hold some of every task. Of each round the loss x in [-1, 1] is how much worse
the candidate is than the best one so far, which has answered all items. The hypothesis is that over all rounds the
losses do not add up to more than 0: the candidate would be at least as good. A gambler who bets against it, with stakes
that depend on earlier rounds only, has a capital that is a supermartingale under the hypothesis, so that it ever
reaches 1 / LEVEL with probability at most LEVEL (Ville's inequality). Then the candidate is stopped.

The order is drawn independently of how the best one was chosen, so the bound holds whatever was selected before.

Source: Waudby-Smith & Ramdas 2024, Estimating means of bounded random variables by betting (arXiv:2010.09686),
section 5 on sampling without replacement; a mixture over stakes in place of an adaptive one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.samples import Floats

LEVEL = 0.05  # probability that a candidate is stopped that would have been at least as good on all search items
STAGES = (16, 64)  # rounds after which the test looks; then all
_STAKES = np.linspace(0.05, 0.95, 10)  # shares of the capital that the gamblers risk


@dataclass(frozen=True)
class Rounds:
    """The items of a search in the order in which one candidate gets them.

    Attributes:
        parts: for each round, the items of each task.
        sizes: the number of items of each task.
    """

    parts: tuple[Mapping[str, tuple[int, ...]], ...]
    sizes: Mapping[str, int]

    @staticmethod
    def of(items: Mapping[str, Sequence[int]], seed: str) -> Rounds:
        """As many rounds as the smallest task has items; each has an equal share of every task, up to one item."""
        rng = random.Random(seed)
        n = min(map(len, items.values()))
        groups: dict[str, list[tuple[int, ...]]] = {}
        for task, ids in items.items():
            drawn = rng.sample(list(ids), len(ids))
            cuts = [i * len(drawn) // n for i in range(n + 1)]
            groups[task] = [tuple(drawn[start:end]) for start, end in itertools.pairwise(cuts)]
            rng.shuffle(groups[task])  # larger groups stand anywhere
        parts = tuple({task: groups[task][i] for task in items} for i in range(n))
        return Rounds(parts, {task: len(ids) for task, ids in items.items()})

    @property
    def stages(self) -> list[int]:
        """The numbers of rounds after which the test looks, and all of them."""
        n = len(self.parts)
        return [*(stage for stage in STAGES if stage <= n // 2), n]

    def items(self, start: int, end: int) -> dict[str, list[int]]:
        """The items of some rounds, by task."""
        return {task: [item for part in self.parts[start:end] for item in part[task]] for task in self.sizes}

    def terms(self, task: str, scores: Mapping[int, float], rounds: int) -> Floats:
        """(rounds,) numbers; over all rounds their mean is the mean score of the task."""
        share = len(self.parts) / self.sizes[task]
        return np.array([share * sum(scores[item] for item in part[task]) for part in self.parts[:rounds]], np.float64)

    def largest(self, task: str) -> float:
        """The largest that a term can be, if scores are at most 1."""
        n = len(self.parts)
        return n / self.sizes[task] * math.ceil(self.sizes[task] / n)


def evidence(losses: Sequence[float] | Floats, n: int) -> float:
    """The largest capital of the mixture of gamblers, from 1; infinite where the hypothesis has become impossible.

    Args:
        losses: (round,) in [-1, 1], in the order in which they were drawn from n.
    """
    drawn = np.asarray(losses, np.float64)
    left = n - np.arange(len(drawn))
    before = np.cumsum(drawn) - drawn
    if (before > left).any() or drawn.sum() > n - len(drawn):
        return math.inf
    # Under the hypothesis the rest adds up to -before at most, so this is the most that is expected of the next.
    expected = -before / left
    fair = np.abs(expected) < 1  # else there is nothing to bet on
    gains = np.where(fair, (drawn - expected) / np.where(fair, 1 + expected, 1.0), 0.0)
    capitals = np.cumsum(np.log1p(_STAKES[:, None] * gains), axis=1)  # (stake, round), logarithms
    mixture = np.logaddexp.reduce(capitals, axis=0) - math.log(len(_STAKES))
    return math.exp(min(float(mixture.max(initial=0.0)), 700.0))
