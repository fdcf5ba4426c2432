"""Tasks, and suites of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from eval.results import TaskResult


@dataclass(frozen=True)
class Task:
    """One task (or group of lm-eval) to run.

    Attributes:
        name: as tables show it and lm-eval knows it.
        spec: what lm-eval loads: a name it has, or a configuration.
        metric: the one that tables show, in lm-eval's words ("acc_norm"); None: chosen by what the task reports.
        needs: the dataset's name where it does not come with a package, for the message if it is not there.
        num_fewshot: examples in each prompt that belong to the task's definition; None: lm-eval's, or --num-fewshot.
        score: what a leaderboard makes of the raw scores, all that were found by name; tables show that instead.
        extra: what pip has to install for the task, besides lm-eval.
        nltk: a resource of NLTK that the task needs, as nltk.data.find takes it.
        also: lm-eval's keys of further metrics whose items are kept, for a score that is made of them.
        guard: of a task that runs what models write: the layers that protect this machine, or MergeError if it cannot.
    """

    name: str
    spec: str | dict[str, object]
    metric: str | None = None
    needs: str | None = None
    num_fewshot: int | None = None
    score: Callable[[Mapping[str, TaskResult]], TaskResult] | None = None
    extra: str | None = None
    nltk: str | None = None
    also: tuple[str, ...] = ()
    guard: Callable[[], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class TaskItems:
    """A task's data as lm-eval takes it (`custom_dataset`): called for the items, which are the split "test"."""

    rows: Callable[[], Sequence[Mapping[str, object]]]

    def __call__(self, **settings: object) -> dict[str, Dataset]:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(self.rows()))}


@dataclass(frozen=True)
class Suite:
    """Tasks that belong together."""

    name: str
    summary: str
    tasks: tuple[Task, ...]
