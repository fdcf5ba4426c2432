"""Loads tasks with their data, and selects the items to ask."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval.missing import unloadable
from eval.quiet import quietly
from eval.results import Questions
from eval.settings import Settings
from eval.tasks import task_manager
from eval.tasks.task import Task
from merge.checkpoint.network import no_network
from merge.errors import MergeError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task as LeafTask
    from lm_eval.tasks import TaskManager


@dataclass
class LoadedTask:
    """A task with its data, and the items to ask."""

    task: Task
    tree: dict[str, Any]  # from lm-eval's TaskManager.load
    samples: dict[str, list[int]]  # of each leaf task; empty: all items
    n_requests: int = 0
    questions: Questions = field(default_factory=dict)

    def sampled(self, settings: Settings) -> LoadedTask:
        """The same task with the items that the settings select. Raises MergeError for a side without items."""
        part = settings.limit or settings.holdout
        leaves = self.tree["tasks"].items() if part else ()
        return LoadedTask(self.task, self.tree, {name: _sample(leaf, name, settings) for name, leaf in leaves})


def load_tasks(tasks: Sequence[Task], settings: Settings) -> list[LoadedTask]:
    """Tasks with their data.

    Raises:
        MergeError: data that is neither cached nor reachable, of all tasks at once, with what to do.
        UsageError: settings that a task does not allow.
    """
    own = [task.spec for task in tasks if isinstance(task.spec, dict)]
    manager = task_manager(settings.include, len(own) < len(tasks))
    if len(own) < len(tasks):
        no_network()  # without one, lm-eval would retry each data set for a minute
    found, missing = [], []
    for task in tasks:
        try:
            tree = _load(manager, task)
        except Exception as error:  # lm-eval, datasets and the hub may raise any error
            missing.append((task, error))
            continue
        found.append(LoadedTask(task, tree, {}).sampled(settings))
    if missing:
        raise unloadable(missing, known=len(found)) from missing[0][1]
    _check_settings(found, settings)
    return found


def _load(manager: TaskManager, task: Task) -> dict[str, Any]:
    """A task's data as prepared by lm-eval; some tasks shuffle the choices of their items while they are read.

    The items are held, so that every model gets the same ones; lm-eval would read them again for each.
    """
    seed()
    with quietly():
        tree: dict[str, Any] = manager.load([task.spec])
    if task.nltk is not None:
        importlib.import_module("nltk").data.find(task.nltk)
    for leaf in tree["tasks"].values():
        read = "test_docs" if leaf.has_test_docs() else "validation_docs"
        setattr(leaf, read, functools.partial(_same, leaf.eval_docs))
    return tree


def _same(docs: Dataset) -> Dataset:
    return docs


def seed() -> None:
    """Sets random seeds as lm-eval's simple_evaluate does before it loads tasks."""
    import random

    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)


def _check_settings(loaded: Sequence[LoadedTask], settings: Settings) -> None:
    """Raises UsageError for settings that a task does not allow, before any model is loaded."""
    fixed = [each.task.name for each in loaded if each.task.num_fewshot is not None]
    if fixed and settings.num_fewshot is not None:
        raise UsageError(
            f"--num-fewshot: the suite sets the examples of {', '.join(fixed)}. Leave it out, or name the tasks "
            "with --tasks."
        )
    shots: dict[str, int | None] = {}
    for each in loaded:
        for name in each.tree["tasks"]:
            if shots.setdefault(name, each.task.num_fewshot) != each.task.num_fewshot:
                raise UsageError(
                    f"{name}: is named alone and in {each.task.name} or a suite, with different numbers of examples."
                )
    unsafe = [name for each in loaded for name, leaf in each.tree["tasks"].items() if runs_code(leaf)]
    if unsafe and not settings.unsafe_code:
        raise UsageError(
            f"{', '.join(unsafe)}: runs code that the model writes, in a process with limits but without a proof that "
            "it does no harm. Allow it with --unsafe-code, or leave the task out with --tasks."
        )
    for each in loaded:
        if each.task.guard is not None:
            each.task.guard()  # fails now on a machine where no code can be run


def runs_code(leaf: LeafTask) -> bool:
    return bool(getattr(leaf, "UNSAFE_CODE", False))


def _sample(leaf: LeafTask, name: str, settings: Settings) -> list[int]:
    """The items to ask. The two sides of a split are disjoint and complete.

    Raises:
        MergeError: a side without items.
    """
    import random

    n = len(leaf.eval_docs)
    drawn = random.Random(f"{settings.seed}:{name}").sample(range(n), min(settings.limit or n, n))
    if settings.holdout:
        aside = round(settings.holdout * len(drawn))
        drawn = drawn[:aside] if settings.held_out else drawn[aside:]
    if not drawn:
        raise MergeError(f"{name}: {n} items cannot be split into {settings.holdout:g} and the rest.")
    return sorted(drawn)
