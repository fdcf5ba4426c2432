"""Who scores candidates: tasks of lm-eval, or a function of Python.

A judge with items has two sides of them, drawn once: `items`, on which a search chooses, and the report's, which no
choice ever sees. One without items scores a candidate as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from eval.models import Subject
from eval.search.objective import Scores, TaskScore
from eval.search.places import Value
from eval.settings import Settings
from merge.errors import MergeError, UsageError
from merge.quoting import quoted
from merge.recipe.model import Recipe

if TYPE_CHECKING:
    from eval.harness import Examiner
    from eval.items import LoadedTask
    from eval.memory import Memory
    from eval.results import ModelScores, Results, TaskResult
    from eval.search.live import LiveModel
    from eval.tasks.task import Task
    from merge.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """One model that a search looks at.

    Attributes:
        values: of the open places; empty for what is no trial.
        recipe: that makes it; None for a model that is there.
        path: of a model that is there, as it is named in recipes.
    """

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)
    recipe: Recipe | None = None
    path: str | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """Raises RecipeError for a recipe that these models do not allow."""
        from merge import build_plan

        assert self.recipe is not None
        return build_plan(self.recipe)

    @property
    def subject(self) -> Subject:
        if self.recipe is None:
            from eval.models import subjects

            return dataclasses.replace(subjects([str(self.path)])[0], name=self.name)
        return Subject(self.name, self.name, plan=self.plan)


class Judge(Protocol):
    """
    Attributes:
        tasks: in order.
        items: those of the search, by task; {} where candidates are scored as a whole.
    """

    tasks: tuple[str, ...]
    items: Mapping[str, tuple[int, ...]]

    def about(self) -> dict[str, object]:
        """What makes it another judge, as JSON."""

    def scores(self, candidate: Candidate, items: Mapping[str, Sequence[int]]) -> Scores:
        """On some of the items, {}: on all of the search."""

    def report(self, candidates: Sequence[Candidate]) -> Results | None:
        """On the items of the report; None if there are none."""


class FunctionJudge:
    """A function of a candidate that gives a number, or one for each of several tasks; more is better."""

    def __init__(self, function: Callable[[Candidate], float | Mapping[str, float]], tasks: Sequence[str] = ()) -> None:
        self._function = function
        self.tasks = tuple(tasks) or ("objective",)
        self.items: Mapping[str, tuple[int, ...]] = {}

    def about(self) -> dict[str, object]:
        return {"tasks": list(self.tasks)}

    def scores(self, candidate: Candidate, items: Mapping[str, Sequence[int]]) -> Scores:
        """Raises MergeError for a function that fails, or gives something else."""
        try:
            found = self._function(candidate)
        except MergeError:
            raise
        except Exception as error:  # somebody else's function
            raise MergeError(f"the objective failed on {candidate.name}: {type(error).__name__}: {error}") from error
        values = {self.tasks[0]: found} if isinstance(found, (int, float)) else found
        if not isinstance(values, Mapping) or list(values) != list(self.tasks):
            raise MergeError(f"the objective gave {quoted(found)}; expected a number for {', '.join(self.tasks)}.")
        for task, value in values.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise MergeError(f"the objective gave {quoted(value)} for {task}; expected a finite number.")
        return {task: TaskScore(float(value)) for task, value in values.items()}

    def report(self, candidates: Sequence[Candidate]) -> Results | None:
        return None


class TaskJudge:
    """Tasks of lm-eval, whose items are split into those of the search and those of the report."""

    def __init__(
        self, tasks: Sequence[Task], settings: Settings, memory: Memory, share: float, threads: int | None = None
    ) -> None:
        """
        Args:
            share: of each task's items that the search may use; with 1 there are none for a report.

        Raises:
            MergeError: data that is missing; a side of the split without items.
        """
        from eval.harness import Examiner
        from eval.items import load_tasks
        from eval.models import remove_left_models
        from eval.quiet import quiet
        from eval.search.live import LiveModel

        quiet()
        remove_left_models()
        search = dataclasses.replace(settings, holdout=share, held_out=True)
        self._rest = dataclasses.replace(settings, holdout=share, held_out=False)
        self._has_report = share < 1
        loaded = load_tasks(tasks, search)
        self._live: LiveModel = LiveModel(settings, memory, threads)
        self._search = Examiner(loaded, search, memory, None)
        rest = [each.sampled(self._rest) for each in loaded] if self._has_report else []
        self._report = Examiner(rest, self._rest, memory, None)
        self.tasks = tuple(each.task.name for each in loaded)
        leaves = all(list(each.samples) == [each.task.name] and each.task.score is None for each in loaded)
        self._sides: Mapping[str, tuple[int, ...]] = {
            name: tuple(ids) for each in loaded for name, ids in each.samples.items()
        }
        self.items: Mapping[str, tuple[int, ...]] = self._sides if leaves else {}

    def split(self) -> dict[str, dict[str, list[int]]]:
        """The items of both sides, by task."""
        report = {name: ids for each in self._report.loaded for name, ids in each.samples.items()}
        return {name: {"search": list(ids), "report": report.get(name, [])} for name, ids in self._sides.items()}

    def about(self) -> dict[str, object]:
        settings = self._rest
        how = [settings.num_fewshot, settings.chat_template, settings.system_instruction]
        return {"tasks": list(self.tasks), "items": self.split(), "settings": [settings.of_numbers(), *how]}

    def scores(self, candidate: Candidate, items: Mapping[str, Sequence[int]]) -> Scores:
        found = self._asked(self._search, candidate, items)
        scores = {task: _score(found.tasks[name]) for task, name in zip(self.tasks, self._names(found), strict=True)}
        if self.items and not all(score.items for score in scores.values()):
            self.items = {}  # a score of all items together, as f1 is
        return scores

    def _names(self, found: ModelScores) -> list[str]:
        tasks = (each.task for each in self._search.loaded)
        return [task.name if task.score is None else task.score(found.tasks).name for task in tasks]

    def _asked(
        self, examiner: Examiner, candidate: Candidate, items: Mapping[str, Sequence[int]] | None = None
    ) -> ModelScores:
        if items:
            examiner = dataclasses.replace(examiner, loaded=[_with(each, items) for each in examiner.loaded])
        live = None if candidate.recipe is None else self._live.open
        return examiner.one(candidate.subject, live)

    def report(self, candidates: Sequence[Candidate]) -> Results | None:
        from eval.results import Results

        if not self._has_report:
            return None
        found = [self._asked(self._report, candidate) for candidate in candidates]
        return Results.of(found, self._rest, self._report.loaded)


def _with(each: LoadedTask, items: Mapping[str, Sequence[int]]) -> LoadedTask:
    return dataclasses.replace(each, samples={name: sorted(items[name]) for name in each.samples})


def _score(result: TaskResult) -> TaskScore:
    items: dict[int, Any] = dict(zip(result.doc_ids, result.items, strict=False)) if result.items else {}
    return TaskScore(result.value, items, result.metric.partition(",")[0], result.higher_is_better)


def refuse_test_sets(tasks: Sequence[Task], allowed: bool) -> tuple[str, ...]:
    """The tasks that are test sets of leaderboards. Raises UsageError if there is one and it is not allowed."""
    from eval.tasks import leaderboards

    known = {
        name for made in (leaderboards.suite_v1(), leaderboards.suite_v2()) for name in (t.name for t in made.tasks)
    }
    found = tuple(
        task.name
        for task in tasks
        if task.score is not None or any(task.name == name or task.name.startswith(f"{name}_") for name in known)
    )
    if found and not allowed:
        raise UsageError(
            f"{', '.join(found)}: test sets of leaderboards. A recipe that is chosen on them has no score there any "
            "more. Search on other tasks, or give --allow-test-set, which the model card then says."
        )
    return found
