"""Results of an evaluation as plain data: models x tasks, with the score of every item.

Results
  models: ModelScores of one model
    tasks: name -> TaskResult, groups and their subtasks side by side
  questions: task -> doc id -> (question, right answer), both cut short
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.samples import Floats, Item, read_samples
from eval.sandbox import described
from merge.loading import code_that_ran

if TYPE_CHECKING:
    from eval.items import LoadedTask
    from eval.settings import Settings
    from eval.tasks.task import Task

FORMAT = 2
FEW = 5  # items that are right, or wrong
Z = 1.959964  # half of a 95 % interval, in standard errors
Questions = Mapping[str, Mapping[str, tuple[str, str]]]  # task -> doc id -> (question, right answer)
# The metric that a table shows for a task that names none: the first that exists.
_PREFERRED = (
    *("acc_norm", "exact_match", "prompt_level_strict_acc", "acc", "pass@1", "pass_at_1", "f1", "mcc", "bleu"),
    *("rouge1", "bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"),
)


@dataclass(frozen=True)
class ScorePart:
    """One raw score of a leaderboard's mean: the task, lm-eval's key of the metric, and the score of guessing."""

    task: str
    metric: str
    chance: float = 0.0

    def normalised(self, value: Floats | float) -> Floats:
        """Scales chance to 0 and everything right to 1; scores below chance are 0."""
        return np.maximum(0.0, (value - self.chance) / (1 - self.chance))


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    Attributes:
        group: the group it is part of; None: asked for by itself.
        metrics: what lm-eval reports, under its keys ("acc,none", "acc_stderr,none").
        metric: the key that tables show.
        value, error: under that key; error is None where lm-eval gives none.
        n: items asked.
        version: of the task.
        items: the metric of each item, in the order of doc_ids; () for groups, and where items have no score.
        answers: what the model said to the first of them, cut short.
        also: items of further metrics, by their keys, in the order of doc_ids.
        parts: of a leaderboard's score; () for all others.
        guard: where code was run that the model wrote, the layers between it and this machine; () for none of ours.
    """

    name: str
    group: str | None
    metrics: Mapping[str, float]
    metric: str
    higher_is_better: bool
    n: int
    version: str
    doc_ids: tuple[int, ...] = ()
    items: tuple[Item, ...] = ()
    answers: tuple[str, ...] = ()
    also: Mapping[str, tuple[Item, ...]] = field(default_factory=dict)
    parts: tuple[ScorePart, ...] = ()
    guard: tuple[str, ...] | None = None

    @property
    def value(self) -> float:
        return self.metrics[self.metric]

    @property
    def error(self) -> float | None:
        name, _, filter_name = self.metric.partition(",")
        return self.metrics.get(f"{name}_stderr,{filter_name}")

    @property
    def span(self) -> tuple[float, float] | None:
        """95 % Wilson interval of a share with fewer than FEW right or wrong items; None for all others.

        The standard error is too small there: 20 right of 20 are not 100 ± 0 %, but 84 to 100 %.
        """
        if not self.items or any(item not in (0.0, 1.0) for item in self.items):
            return None
        right = round(sum(item == 1.0 for item in self.items))
        return wilson(right, len(self.items)) if min(right, len(self.items) - right) < FEW else None

    @property
    def spread(self) -> float | None:
        """Standard error; near 0 and 1 the one that the Wilson interval implies."""
        return (self.span[1] - self.span[0]) / (2 * Z) if self.span else self.error

    @staticmethod
    def read(task: Task, raw: Mapping[str, Any]) -> tuple[dict[str, TaskResult], Questions]:
        """The output of lm-eval's evaluate -> the scores, and their questions."""
        groups: dict[str, str] = {}
        for group, children in raw.get("group_subtasks", {}).items():
            groups.update(dict.fromkeys(children, group))
        found, questions = {}, {}
        for name, values in {**raw["results"], **raw.get("groups", {})}.items():
            metrics = {
                key: float(value)
                for key, value in values.items()
                if "," in key and isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            if not metrics:
                continue  # a group without a score of its own
            metric = _main_metric(task.metric, metrics)
            logged = raw.get("samples", {}).get(name, ())
            samples = read_samples(logged, metric, metrics[metric])
            if samples.questions:
                questions[name] = samples.questions
            better = raw.get("higher_is_better", {}).get(name, {}).get(metric.partition(",")[0])
            found[name] = TaskResult(
                name=name,
                group=groups.get(name),
                metrics=metrics,
                metric=metric,
                higher_is_better=better is not False,
                n=len(samples.doc_ids) or int(values.get("sample_len", 0)),
                version=str(raw.get("versions", {}).get(name, "")),
                doc_ids=samples.doc_ids,
                items=samples.items,
                answers=samples.answers,
                also={key: read_samples(logged, key, metrics[key]).items for key in task.also if key in metrics},
            )
        return found, questions

    def leaves(self, tasks: Mapping[str, TaskResult]) -> tuple[str, ...]:
        """The tasks with items that this one is made of, or itself; `tasks` are all of its model."""
        parts = [part.leaves(tasks) for part in tasks.values() if part.group == self.name]
        return tuple(name for part in parts for name in part) or (self.name,)


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % score interval of the share right / n (Wilson 1927)."""
    share, room = right / n, Z * Z / n
    middle = (share + room / 2) / (1 + room)
    half = Z * math.sqrt(share * (1 - share) / n + room / (4 * n)) / (1 + room)
    return max(0.0, middle - half), min(1.0, middle + half)


def _main_metric(wanted: str | None, metrics: Mapping[str, float]) -> str:
    scores = [key for key in metrics if "_stderr," not in key]
    for name in (wanted, *_PREFERRED):
        for key in scores:
            if name in (key, key.partition(",")[0]):
                return key
    return scores[0]


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model on all tasks.

    Attributes:
        path: its directory, or BASE+ADAPTER; None for what is merged on the fly.
        parents: the models a merge was made of, by their paths or as its manifest calls them.
        asked, remembered: requests.
    """

    name: str
    text: str
    path: str | None
    digest: str
    parents: tuple[str, ...]
    seconds: float
    asked: int
    remembered: int
    tasks: Mapping[str, TaskResult]


@dataclass(frozen=True)
class Results:
    """A whole evaluation.

    Attributes:
        tasks: that tables show, in order.
        questions: what was asked, of the first items of each task.
        path: where the models lie between the first and the last of them, 0 to 1; () unless they are a path.
    """

    models: tuple[ModelScores, ...]
    tasks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    questions: Questions = field(default_factory=dict)
    path: tuple[float, ...] = ()

    @staticmethod
    def of(models: Sequence[ModelScores], settings: Settings, loaded: Sequence[LoadedTask]) -> Results:
        said = dataclasses.asdict(settings) | {"include": settings.include and str(settings.include)}
        samples = {name: ids for each in loaded for name, ids in each.samples.items()}
        names = tuple(name for each in loaded for name in _columns(each, models))
        questions = {name: asked for each in loaded for name, asked in each.questions.items()}
        said |= {"samples": samples, "trusted_code": code_that_ran()}
        return Results(tuple(models), names, said, versions(), questions)

    def is_sample(self, task: str) -> bool:
        """Whether a leaderboard's task was run on a subset, so its score is not comparable with the leaderboard."""
        part = any(self.settings.get(key) for key in ("limit", "holdout"))
        return part and any(model.tasks[task].parts for model in self.models)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes to show with the scores."""
        return (*self._of_samples(), *self._of_guards())

    def _of_samples(self) -> tuple[str, ...]:
        names = [name for name in self.tasks if self.is_sample(name)]
        if not names:
            return ()
        limit, holdout = (self.settings.get(key) for key in ("limit", "holdout"))
        size = f"{limit} items a task" if limit else "the items of each task"
        if holdout:
            size = f"{holdout if self.settings.get('held_out') else 1 - holdout:.0%} of {size}"
        return (f"{', '.join(names)}: on a sample of {size}; not a leaderboard score.",)

    def _of_guards(self) -> tuple[str, ...]:
        """The guards under which models' code was run; they may differ between compared files."""
        tasks: dict[tuple[str, ...], dict[str, None]] = {}
        for model in self.models:
            for name, task in model.tasks.items():
                if task.guard is not None:
                    tasks.setdefault(task.guard, {})[name] = None
        return tuple(f"{', '.join(names)}: {described(layers)}." for layers, names in tasks.items())

    def to_json(self) -> str:
        return (
            json.dumps({"format": FORMAT, "notes": self.notes, **dataclasses.asdict(self)}, ensure_ascii=False) + "\n"
        )


def _columns(each: LoadedTask, models: Sequence[ModelScores]) -> list[str]:
    """The columns of a task in tables: a leaderboard's score, the task, or the parts of a group without a score."""
    known = models[0].tasks if models else {}
    if each.task.score is not None and known:
        return [each.task.score(known).name]
    if each.task.name in known:
        return [each.task.name]
    return [name for name in each.tree["tasks"] if name in known]


def versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("lm_eval", "transformers", "torch", "merge-workbench")}
