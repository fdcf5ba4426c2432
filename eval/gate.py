"""Decides whether a merge may replace a model: the mean rises and no task falls significantly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from eval.compare import Comparison, Merged, averaged, holm, pick
from eval.difference import SIGNIFICANT, Difference, differences
from eval.results import ModelScores
from merge.errors import UsageError


@dataclass(frozen=True)
class Gate:
    """One merge against the model it would replace.

    Attributes:
        against: that model.
        mean: the difference of the averages, or of the only task.
        fallen: the tasks on which the merge is significantly worse, p corrected by Holm for all tasks.
        passed: nothing has fallen, and the mean rises.
    """

    model: str
    against: str
    mean: Difference
    fallen: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        return not self.fallen and self.mean.value > 0

    def __str__(self) -> str:
        name = f"gate: {self.model} against {self.against}"
        if self.passed:
            return f"{name}: passed. The mean rises and no task falls significantly."
        why = [f"{one.task} falls by {-one.value:.3g} (p = {one.p:.2g}, corrected)" for one in self.fallen]
        if self.mean.value <= 0:
            why.append("the mean does not rise")
        return f"{name}: not passed. {'; '.join(why).capitalize()}."


def gates(comparison: Comparison, against: str | None = None) -> tuple[Gate, ...]:
    """One for each merge of the comparison.

    Args:
        against: the name of the model that each merge would replace; None: its best parent on average.

    Raises:
        UsageError: there is no merge; a name that no model has; tasks without items or a common mean.
    """
    if not comparison.merges:
        raise UsageError("--gate: there is no merge among the models. Name it with --merge NAME --parents A,B.")
    return tuple(_gate(comparison, merged, against) for merged in comparison.merges)


def _gate(comparison: Comparison, merged: Merged, against: str | None) -> Gate:
    results = comparison.results
    other = _rival(comparison, merged, against)
    tasks = [differences(merged.model, [other], [task])[0] for task in results.tasks]
    untested = [one for one in tasks if one.p is None]
    if untested:
        raise UsageError(f"--gate: {untested[0].task} cannot be tested: {untested[0].why}. Leave it out by --tasks.")
    names = averaged(results)
    if not names and len(tasks) > 1:
        raise UsageError(f"--gate: {', '.join(results.tasks)} have no common mean. Name one task, or accuracies.")
    (mean,) = differences(merged.model, [other], names) if names else tasks
    return Gate(merged.model.name, other.name, mean, _fallen(tasks))


def _rival(comparison: Comparison, merged: Merged, against: str | None) -> ModelScores:
    if against is None:
        return pick(comparison.results, merged.gains[-1].best.other)
    other = pick(comparison.results, against)
    if other is merged.model:
        raise UsageError(f"--gate-against {against}: this is the merge itself.")
    return other


def _fallen(tasks: Sequence[Difference]) -> tuple[Difference, ...]:
    corrected = holm([one.p for one in tasks])
    return tuple(
        dataclasses.replace(one, p=p)
        for one, p in zip(tasks, corrected, strict=True)
        if one.value < 0 and p is not None and p < SIGNIFICANT
    )
