"""Early stopping of candidates: never more often than its level where it would be wrong, and soon where it is right."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest

from eval.search.objective import GoalKind, SearchGoal, TaskScore, duel
from eval.search.stopping import LEVEL, STAGES, Rounds, evidence

RUNS = 300


def stopped(objective: SearchGoal, mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], seed: int) -> bool:
    """Whether a candidate is stopped before it was asked everything."""
    sides = [
        {task: TaskScore(float(each.mean()), dict(enumerate(each.tolist())), "acc") for task, each in side.items()}
        for side in (mine, theirs)
    ]
    rounds = Rounds.of({task: range(len(each)) for task, each in mine.items()}, str(seed))
    for asked in rounds.stages[:-1]:
        items = rounds.items(0, asked)
        part = {
            task: TaskScore(0.0, {item: score.items[item] for item in items[task]}, "acc")
            for task, score in sides[0].items()
        }
        if duel(objective, rounds, part, sides[1], asked).lost:
            return True
    return False


def rate(goal: GoalKind, sizes: Mapping[str, int], shares: tuple[float, float], at_least_as_good: bool) -> float:
    """How often a candidate is stopped; of those only that are at least as good on all items, if asked."""
    rng = np.random.default_rng(0)
    counted = hits = 0
    while counted < RUNS:
        mine, theirs = ({task: (rng.random(n) < share).astype(float) for task, n in sizes.items()} for share in shares)
        value = {id(side): [each.mean() for each in side.values()] for side in (mine, theirs)}
        score = np.mean if goal == "mean" else np.min
        if at_least_as_good and score(value[id(mine)]) < score(value[id(theirs)]) - 1e-12:
            continue
        counted += 1
        hits += stopped(SearchGoal(goal), mine, theirs, counted)
    return hits / RUNS


@pytest.mark.parametrize("goal", ["mean", "worst"])
@pytest.mark.parametrize("sizes", [{"a": 130}, {"a": 130, "b": 150}, {"a": 130, "b": 400, "c": 131}])
def test_a_candidate_as_good_is_stopped_no_more_often_than_the_level(goal: GoalKind, sizes: dict[str, int]) -> None:
    """The worst case: whole lists of items on which the candidate is as good as the best, or hardly better."""
    assert rate(goal, sizes, (0.5, 0.5), True) <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / RUNS)


def test_the_worst_order_is_as_rare_as_the_level() -> None:
    """Losses that add up to exactly 0 over all rounds, looked at after every one of them."""
    rng = random.Random(0)
    losses = [1.0] * 60 + [-1.0] * 60 + [0.0] * 30
    hits = 0
    for _ in range(RUNS):
        rng.shuffle(losses)
        hits += any(evidence(losses[:n], len(losses)) >= 1 / LEVEL for n in (16, 32, 64, 100, 140))
    assert hits / RUNS <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / RUNS)


def test_a_bad_candidate_is_stopped_soon() -> None:
    assert rate("mean", {"a": 200, "b": 200, "c": 200}, (0.3, 0.8), False) > 0.99
    assert rate("worst", {"a": 200, "b": 200}, (0.2, 0.9), False) > 0.99


def test_what_has_become_impossible_stops_for_sure() -> None:
    assert evidence([1.0] * 6, 10) == math.inf
    assert evidence([1.0] * 5, 10) < math.inf
    assert evidence([-1.0] * 10, 10) == 1.0
    assert evidence([], 10) == 1.0


def test_rounds_hold_every_item_once_and_give_every_task_its_mean() -> None:
    sizes = {"a": 40, "b": 101, "c": 53}
    rounds = Rounds.of({task: range(100, 100 + n) for task, n in sizes.items()}, "seed")
    assert len(rounds.parts) == 40
    for task, n in sizes.items():
        items = rounds.items(0, 40)[task]
        assert sorted(items) == list(range(100, 100 + n))
        scores = {item: float(item % 7 == 0) for item in items}
        terms = rounds.terms(task, scores, 40)
        assert terms.mean() == pytest.approx(np.mean(list(scores.values())))
        assert rounds.terms(task, dict.fromkeys(items, 1.0), 40).max() == pytest.approx(rounds.largest(task))
    assert rounds.stages == [16, 40]
    assert STAGES == (16, 64)
    assert Rounds.of({"a": range(30)}, "seed") != Rounds.of({"a": range(30)}, "other seed")


def test_an_estimate_is_that_of_the_best_and_the_difference_on_the_same_items() -> None:
    best = {"a": TaskScore(0.75, {i: float(i % 4 > 0) for i in range(100)}, "acc")}
    rounds = Rounds.of({"a": range(100)}, "seed")
    asked = rounds.items(0, 16)["a"]
    mine = {"a": TaskScore(0.0, {i: float(i % 4 > 1) for i in asked}, "acc")}
    lost = sum(i % 4 == 1 for i in asked) / 16
    assert duel(SearchGoal(), rounds, mine, best, 16).value == pytest.approx(0.75 - lost)


def test_losses_without_bounds_count_by_their_sign() -> None:
    best = {"text": TaskScore(1.0, dict.fromkeys(range(60), (100.0, 50.0)), "bits_per_byte", False)}
    rounds = Rounds.of({"text": range(60)}, "seed")

    def against(loss: float) -> bool:
        items = dict.fromkeys(rounds.items(0, 16)["text"], (loss, 50.0))
        return duel(SearchGoal(), rounds, {"text": TaskScore(0.0, items, "bits_per_byte", False)}, best, 16).lost

    assert against(101.0)
    assert not against(99.0)
