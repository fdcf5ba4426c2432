"""Tests and intervals for differences between models on the same items, by random halves of the items.

A draw takes each item with probability 1/2, independently within each task.

* **Test.** On the items of a draw the two models exchange their answers, and the difference of the scores is computed
  again. If neither model is better, every exchange is as likely as the answers that were seen, so p is the share of
  exchanges with a difference at least as large. For a mean this is the sign-flip test (Fisher 1935, The Design of
  Experiments, ch. 3): exact at any number of items. Up to EXACT items all 2^n exchanges are computed.
* **Interval.** The difference over the items of a draw alone. The interval between two order statistics of these
  subsample values has its nominal level for means of symmetric differences (Hartigan 1969, Using subsample values as
  typical values), and holds the values that the test does not reject. Right-or-wrong tasks get one item more of each
  kind, gained and lost (as Agresti & Min 2005 and Bonett & Price 2012 add to the cells of the two-by-two table): else
  two models that agree on 20 items would be called equal for sure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.samples import Floats, aggregate

DRAWS = 10_000
EXACT = 12  # items
LEAST = 6  # items: with five, 2 of 2^5 exchanges are as extreme as the most extreme, which is more than 5 %
LEVEL = 0.95
_MANY = 256  # kinds of items; of right or wrong for merge and four parents there are 32
_SEED = 0  # so that intervals are reproducible

Scores = Mapping[tuple[str, str], Floats]  # (task, metric) -> its value, one for each draw
Statistic = Callable[[Scores], Floats]


@dataclass(frozen=True)
class Answers:
    """What several models scored on one metric of one task.

    table: (item, 2 * model) scores and weights of the models, the judged one first.
    """

    task: str
    metric: str
    table: Floats

    @property
    def right_or_wrong(self) -> bool:
        scores, weights = self.table[:, 0::2], self.table[:, 1::2]
        return bool(np.isin(scores, (0.0, 1.0)).all() and (weights == 1.0).all())


@dataclass(frozen=True)
class Draws:
    """Sums of scores and weights, by task and metric.

    Attributes:
        whole: (2 * model), over all items.
        drawn: (draw, 2 * model), over the items of each draw.
        added: (draw, 2), whether the additional item that is gained, or the one that is lost, is in the draw.
    """

    whole: Mapping[tuple[str, str], Floats]
    drawn: Mapping[tuple[str, str], Floats]
    added: Mapping[tuple[str, str], Floats]

    def exchanged(self, rival: int, statistic: Statistic) -> tuple[float, Floats]:
        """The observed statistic (one side's score minus the other's), and with answers exchanged on each draw."""
        sides: tuple[dict[tuple[str, str], Floats], ...] = ({}, {})
        seen: tuple[dict[tuple[str, str], Floats], ...] = ({}, {})
        for key, whole in self.whole.items():
            moved = self.drawn[key][:, _columns(rival)] - self.drawn[key][:, _columns(0)]
            for side, place, sign in ((0, 0, 1), (1, rival, -1)):
                sums = whole[_columns(place)]
                seen[side][key] = _value(key, sums[None])
                sides[side][key] = _value(key, sums + sign * moved)
        observed = statistic(seen[0]) - statistic(seen[1])
        return float(observed[0]), statistic(sides[0]) - statistic(sides[1])

    def halves(self, rival: int, statistic: Statistic) -> Floats:
        """(draw,) sorted: the statistic over the items of each draw alone."""
        sides: tuple[dict[tuple[str, str], Floats], ...] = ({}, {})
        for key, drawn in self.drawn.items():
            more = self.added.get(key)
            for side, place in ((0, 0), (1, rival)):
                sums = drawn[:, _columns(place)]
                if more is not None:
                    sums = sums + np.stack([more[:, side], more.sum(axis=1)], axis=1)
                sides[side][key] = _value(key, sums)
        found = statistic(sides[0]) - statistic(sides[1])
        return np.sort(found[np.isfinite(found)])


def _columns(model: int) -> slice:
    return slice(2 * model, 2 * model + 2)


def _value(key: tuple[str, str], sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without items
        found: Floats = aggregate(key[1].partition(",")[0], sums[:, 0], sums[:, 1])
    return found


def draw(answers: Sequence[Answers]) -> Draws:
    """Draws for a comparison; all metrics of a task and all models get the same items."""
    rng = np.random.default_rng(_SEED)
    tasks: dict[str, list[Answers]] = {}
    for each in answers:
        tasks.setdefault(each.task, []).append(each)
    exact = len(tasks) == 1 and len(answers[0].table) <= EXACT
    whole, drawn, added = {}, {}, {}
    for group in tasks.values():
        joint = np.hstack([each.table for each in group])
        width = group[0].table.shape[1]
        if exact:
            sums, more = _all_halves(joint, any(each.right_or_wrong for each in group))
        else:
            sums = _random_halves(joint, rng)
            more = rng.integers(0, 2, (len(sums), 2)).astype(np.float64)
        for place, each in enumerate(group):
            key = (each.task, each.metric)
            whole[key] = each.table.sum(axis=0)
            drawn[key] = sums[:, place * width : (place + 1) * width]
            if each.right_or_wrong:
                added[key] = more
    return Draws(whole, drawn, added)


def _all_halves(table: Floats, more: bool) -> tuple[Floats, Floats]:
    """(item, column) -> (subset, column) and (subset, 2): sums over every subset of the items, and of two more."""
    n = len(table)
    bits = n + 2 if more else n
    chosen = ((np.arange(1 << bits)[:, None] >> np.arange(n + 2)) & 1).astype(np.float64)
    return chosen[:, :n] @ table, chosen[:, n:]


def _random_halves(table: Floats, rng: np.random.Generator) -> Floats:
    """(item, column) -> (DRAWS, column): sums over random halves of the items."""
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    if len(kinds) <= _MANY:
        # How many items of a kind a draw takes is binomial: the same law, without a number for each item.
        return rng.binomial(counts, 0.5, (DRAWS, len(kinds))).astype(np.float64) @ kinds
    step = max(1, 4_000_000 // len(table))  # draws at once: 32 MB of numbers
    sizes = [min(step, DRAWS - start) for start in range(0, DRAWS, step)]
    return np.concatenate([rng.integers(0, 2, (size, len(table)), np.int8) @ table for size in sizes])


def p_values(differences: Sequence[tuple[float, Floats]]) -> list[tuple[float, float]]:
    """For each rival (p of this pair alone, p corrected for having looked at all of them), both two-sided.

    Args:
        differences: of each rival, as Draws.exchanged gives them.

    The second is Westfall & Young's (1993) single-step max-T: the share of draws in which the largest of all
    differences, each in units of its own spread, is at least as large as this one.
    """
    seen, exchanged = zip(*differences, strict=True)
    n = len(exchanged[0])
    complete = n & (n - 1) == 0  # all exchanges, the answers as seen among them
    spread = [float(np.sqrt(np.mean(values**2))) or 1.0 for values in exchanged]
    scaled = [np.abs(values) / unit for values, unit in zip(exchanged, spread, strict=True)]
    largest = np.max(scaled, axis=0)

    def share(values: Floats, least: float) -> float:
        count = int((values >= least * (1 - 1e-9) - 1e-12).sum())  # sums in another order differ in their last bits
        return count / n if complete else (count + 1) / (n + 1)

    found = []
    for value, unit, one in zip(seen, spread, scaled, strict=True):
        alone = share(one, abs(value) / unit)
        found.append((alone, max(alone, share(largest, abs(value) / unit))))
    return found


def bounds(halves: Floats, share: float = 1 - LEVEL) -> tuple[float, float]:
    """The interval that misses the true difference with probability `share`, half of it at each end."""
    place = max(1, int(share / 2 * (len(halves) + 1)))
    return float(halves[place - 1]), float(halves[-place])
