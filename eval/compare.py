"""Compares merges with their parents: finds both, and computes averages and the gain on every task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.difference import SIGNIFICANT, Difference, differences
from eval.results import ModelScores, Results, TaskResult
from merge.errors import UsageError


def parents(results: Results, model: ModelScores) -> list[ModelScores]:
    """The models among the results that a merge was made of; [] if none of them was judged."""
    found = []
    for text in model.parents:
        place = _place(text)
        same = [other for other in results.models if other is not model and other.path and place == _place(other.path)]
        near = [other for other in results.models if other is not model and text in (other.text, other.name)]
        named = [other for other in results.models if other is not model and other.name == Path(text).name]
        found += (same or near or named)[:1]
    return list({other.name: other for other in found}.values())


def _place(text: str) -> str:
    """A directory, or BASE+ADAPTER, in full."""
    return "+".join(str(Path(part).resolve()) for part in text.split("+"))


@dataclass(frozen=True)
class Gain:
    """A merge against its parents on one task.

    Which parent is best is seen on the same items, so the best one is partly the luckiest. A merge is better than the
    best parent if it is better than every parent, so p is the largest of the pairs' (an intersection-union test; Berger
    1982). It is worse if it is worse than some parent, so p is corrected for having looked at all of them (max-T).

    Attributes:
        task: or AVERAGE.
        best: the difference to the best of the parents on it.
        low, high: 95 % interval of the gain over whichever parent is truly best: the lowest of the pairs' lower ends,
            and the lowest of their upper ends, corrected.
        p: two-sided, of the gain over the best parent, the choice taken into account.
        p_adjusted: Holm's, for all gains of a comparison that are shown together; see `adjust`.
        over_mean: over the mean of the parents' scores; positive is better.
        each: the differences to all parents, in their order.
    """

    model: str
    task: str
    best: Difference
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    over_mean: float
    each: tuple[Difference, ...]

    @property
    def significant(self) -> bool:
        """At the 5 % level, corrected for all gains shown together."""
        return self.p_adjusted is not None and self.p_adjusted < SIGNIFICANT


def gains(results: Results, model: ModelScores, rivals: Sequence[ModelScores]) -> list[Gain]:
    """The gains on each task, and on the average if there is one."""
    asked = [[task] for task in results.tasks] + ([list(averaged(results))] if averaged(results) else [])
    return [_gain(differences(model, rivals, tasks)) for tasks in asked]


def _gain(each: tuple[Difference, ...]) -> Gain:
    best = min(each, key=lambda one: one.value)  # the least ahead of: the best of the others
    lows = [one.low for one in each if one.low is not None]
    highs = [one.high_among for one in each if one.high_among is not None]
    ps = [one.p for one in each if one.p is not None]
    p = best.p_among if best.value <= 0 else max(ps, default=None)
    low, high = (min(lows), min(highs)) if lows and highs else (None, None)
    return Gain(best.model, best.task, best, low, high, p, p, sum(one.value for one in each) / len(each), each)


def adjust(merges: Sequence[Merged]) -> tuple[Merged, ...]:
    """With Holm's correction (1979) over all merges: their last gains, which the verdicts use, are one family;
    the gains on single tasks are another."""
    last = holm([merged.gains[-1].p for merged in merges])
    others = iter(holm([gain.p for merged in merges for gain in merged.gains[:-1]]))
    adjusted = []
    for merged, final in zip(merges, last, strict=True):
        tasks = [dataclasses.replace(gain, p_adjusted=next(others)) for gain in merged.gains[:-1]]
        tasks.append(dataclasses.replace(merged.gains[-1], p_adjusted=final))
        adjusted.append(dataclasses.replace(merged, gains=tuple(tasks)))
    return tuple(adjusted)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values, in the order given; None stays None and does not count."""
    known = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    found: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        found[place] = largest
    return found


def is_share(task: TaskResult) -> bool:
    """Whether a score is a share, shown in percent."""
    return task.higher_is_better and 0.0 <= task.value <= 1.0


def in_percent(results: Results, task: str) -> bool:
    """Whether all models' scores on a task are shares."""
    return all(is_share(model.tasks[task]) for model in results.models)


def averaged(results: Results) -> tuple[str, ...]:
    """The tasks of an average: only scores that are shares can be averaged; () for fewer than two."""
    names = [name for name in results.tasks if in_percent(results, name)]
    return tuple(names) if len(names) > 1 else ()


def average(results: Results, model: ModelScores) -> float:
    """Mean of the averaged tasks' scores, equally weighted."""
    names = averaged(results)
    return sum(model.tasks[name].value for name in names) / len(names)


def average_error(results: Results, model: ModelScores) -> float | None:
    """Standard error of the average; the tasks' items are drawn independently."""
    errors = [model.tasks[name].spread for name in averaged(results)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def pick(results: Results, name: str) -> ModelScores:
    """Raises UsageError for a model that was not judged."""
    for model in results.models:
        if name in (model.name, model.text):
            return model
    raise UsageError(f'no results for "{name}"; there are: {", ".join(model.name for model in results.models)}.')


@dataclass(frozen=True)
class Merged:
    """A merge among the results, those of its parents that were judged too, and its gains over them, task by task."""

    model: ModelScores
    parents: tuple[ModelScores, ...]
    gains: tuple[Gain, ...]


@dataclass(frozen=True)
class Comparison:
    """Results and the merges among them, from which pages and tables are made."""

    results: Results
    merges: tuple[Merged, ...] = ()

    def merged(self, model: ModelScores) -> Merged | None:
        """`model` as a merge, if it is one."""
        return next((each for each in self.merges if each.model is model), None)


def compare(results: Results, names: Sequence[str] = (), named: Sequence[str] = ()) -> Comparison:
    """Finds the merges and their parents, if they are not named, by what the merges' manifests or recipes say.

    Args:
        names: the merges' names; where none is given, all models whose parents are here too, but for those that are
            parents of others themselves (an adapter of a merge of adapters).
        named: the parents' names, of every merge.

    Raises:
        UsageError: a name that no model has; parents without a merge.
    """
    if results.path and not names:  # the points of a path do not compete
        return Comparison(results)
    chosen = [pick(results, name) for name in names] or _merges(results, named)
    return Comparison(results, adjust([_merged(results, model, named) for model in chosen]))


def _merged(results: Results, model: ModelScores, named: Sequence[str]) -> Merged:
    rivals = [pick(results, name) for name in named] or parents(results, model)
    rivals = [rival for rival in rivals if rival is not model]
    if not rivals:
        others = ", ".join(other.name for other in results.models if other is not model) or "no other model"
        raise UsageError(f"no parent of {model.name} is among {others}. Name them: --parents A,B.")
    return Merged(model, tuple(rivals), tuple(gains(results, model, rivals)))


def _merges(results: Results, named: Sequence[str]) -> list[ModelScores]:
    if named:
        rivals = [pick(results, name) for name in named]
        others = [model for model in results.models if model not in rivals]
        known = [model for model in others if model.parents] or others
        if len(others) > 1 and known is others:
            raise UsageError(f"which is the merge of {', '.join(other.name for other in others)}? Say --merge NAME.")
        return known
    found = {model.name: parents(results, model) for model in results.models}
    within = {parent.name for each in found.values() for parent in each if found[parent.name]}
    return [model for model in results.models if found[model.name] and model.name not in within]
