"""Merges against their parents: which models are which, averages, and the gains on every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.difference import AVERAGE, Difference, average_difference, difference
from eval.results import Results, TaskResult, Verdicts
from merge.errors import UsageError


def parents(results: Results, model: Verdicts) -> list[Verdicts]:
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
    if names := averaged(results):
        found.append(_gain(model, [average_difference(model, rival, names) for rival in rivals], AVERAGE))
    return found


def _gain(model: Verdicts, each: Sequence[Difference], task: str) -> Gain:
    best = min(each, key=lambda one: one.value)  # the least ahead of: the best of the others
    return Gain(model.name, task, best, sum(one.value for one in each) / len(each), tuple(each))


def is_share(task: TaskResult) -> bool:
    """Whether a score is a share of 1, shown in percent."""
    return task.higher_is_better and 0.0 <= task.value <= 1.0


def in_percent(results: Results, task: str) -> bool:
    """Whether all models' scores on a task are shares."""
    return all(is_share(model.tasks[task]) for model in results.models)


def averaged(results: Results) -> tuple[str, ...]:
    """The tasks that an average is of: only scores of one scale can be averaged, shares of 1; () for fewer than two."""
    names = [name for name in results.tasks if in_percent(results, name)]
    return tuple(names) if len(names) > 1 else ()


def average(results: Results, model: Verdicts) -> float:
    """Mean of the averaged tasks' scores, each counting the same."""
    names = averaged(results)
    return sum(model.tasks[name].value for name in names) / len(names)


def average_error(results: Results, model: Verdicts) -> float | None:
    """Standard error of the average; the tasks' items are drawn independently."""
    errors = [model.tasks[name].error for name in averaged(results)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def pick(results: Results, name: str) -> Verdicts:
    """Raises UsageError for a model that was not judged."""
    for model in results.models:
        if name in (model.name, model.text):
            return model
    raise UsageError(f'no results for "{name}"; there are: {", ".join(model.name for model in results.models)}.')


@dataclass(frozen=True)
class Merged:
    """A merge among the results, those of its parents that were judged too, and its gains over them, task by task."""

    model: Verdicts
    parents: tuple[Verdicts, ...]
    gains: tuple[Gain, ...]


@dataclass(frozen=True)
class Comparison:
    """Results and the merges among them; what pages and tables are made from."""

    results: Results
    merges: tuple[Merged, ...] = ()

    def merged(self, model: Verdicts) -> Merged | None:
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
    if results.path and not names:  # the points of a path are no rivals
        return Comparison(results)
    chosen = [pick(results, name) for name in names] or _merges(results, named)
    return Comparison(results, tuple(_merged(results, model, named) for model in chosen))


def _merged(results: Results, model: Verdicts, named: Sequence[str]) -> Merged:
    rivals = [pick(results, name) for name in named] or parents(results, model)
    rivals = [rival for rival in rivals if rival is not model]
    if not rivals:
        others = ", ".join(other.name for other in results.models if other is not model) or "no other model"
        raise UsageError(f"no parent of {model.name} is among {others}. Name them: --parents A,B.")
    return Merged(model, tuple(rivals), tuple(gains(results, model, rivals)))


def _merges(results: Results, named: Sequence[str]) -> list[Verdicts]:
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
