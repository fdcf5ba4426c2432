"""Finds tasks: lm-eval's by name, tasks of your own, and suites.

resolve(["arc_easy"], suite="quickstart", include=...) -> Tasks
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.tasks.task import Suite, Task
from merge.checkpoint.network import ask_early
from merge.errors import UsageError
from merge.schema.names import suggest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# suite -> module and its function that makes the Suite
SUITES = {
    "quickstart": "eval.tasks.quickstart:suite",
    "core": "eval.tasks.core:suite",
    "openllm-v1": "eval.tasks.leaderboards:suite_v1",
    "openllm-v2": "eval.tasks.leaderboards:suite_v2",
}


def get_suite(name: str) -> Suite:
    """The suite of this name. Raises UsageError if there is none."""
    if name not in SUITES:
        raise UsageError(f'unknown suite "{name}"; {suggest(name, SUITES)}')
    module, _, function = SUITES[name].partition(":")
    found: Suite = getattr(importlib.import_module(module), function)()
    return found


def resolve(
    names: Sequence[str], suite: str | None, include: Path | None = None, data: Path | None = None
) -> tuple[Task, ...]:
    """The requested tasks, in order, each once.

    Args:
        names: of lm-eval, of `include`, or paths of .jsonl and .yaml files. Names of tasks of the suite pick those of
            it; others are added.
        include: a directory with tasks of one's own: lm-eval's YAML, or jsonl.
        data: a text whose loss is measured.

    Raises:
        UsageError: an unknown name, with the nearest ones; a file that cannot be read.
    """
    known = get_suite(suite).tasks if suite else ()
    picked = {task.name: task for task in known if task.name in names}
    tasks = [] if picked else list(known)
    own = _own(include) if include else {}
    for name in names:
        if name in picked:
            tasks.append(picked[name])
        elif name in own:
            tasks.append(own[name])
        elif name.endswith((".jsonl", ".yaml", ".yml")):
            tasks.append(_file(Path(name)))
        else:
            _check_known(name, list(own))
            tasks.append(Task(name, name))
    tasks += [] if names or suite else own.values()
    if data is not None:
        from eval.tasks.text import text_task

        tasks.append(text_task(data))
    if not tasks:
        raise UsageError(f"nothing to evaluate: name a suite (--suite {' | '.join(SUITES)}), --tasks or --data.")
    return tuple({task.name: task for task in tasks}.values())


def _own(include: Path) -> dict[str, Task]:
    if not include.is_dir():
        raise UsageError(f"--include {include}: there is no such directory.")
    files = sorted(path for path in include.iterdir() if path.suffix in (".jsonl", ".yaml", ".yml"))
    if not files:
        raise UsageError(f"--include {include}: holds no .jsonl and no .yaml file.")
    return {task.name: task for task in (_file(path, indexed=True) for path in files)}


def _file(path: Path, indexed: bool = False) -> Task:
    """indexed: whether lm-eval has indexed the file's directory, as a group needs for its tasks."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such task file.")
    if path.suffix == ".jsonl":
        from eval.tasks.jsonl import jsonl_task

        return jsonl_task(path)
    from merge.schema.document import FileKind, read_document, read_text, texts_of

    # The tag is lm-eval's, for Python's functions.
    kind = FileKind("task file", "task: my_task", "task or group", tags=("!function",))
    named = texts_of(read_document(read_text(path, kind), str(path), kind))
    name = named.get("group") or named.get("task")
    if name is None:
        raise UsageError(
            f'{path}: expected a task or group of lm-eval, with the key "task" or "group" and a name. See docs/eval.md.'
        )
    if "group" in named and not indexed:
        raise UsageError(f"{path}: is a group of tasks. Give the directory that holds them with --include.")
    return Task(name, name if indexed else str(path.resolve()))


@functools.cache
def task_manager(include: Path | None, defaults: bool) -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to make: with its own, if `defaults`, and those of `include`."""
    from lm_eval.tasks import TaskManager

    if defaults:  # their data may have to come from the hub, which answers in the meantime
        ask_early()
    return TaskManager(include_path=include and str(include), include_defaults=defaults)


def _check_known(name: str, own: list[str]) -> None:
    known = task_manager(None, True).all_tasks
    if name not in known:
        for suite in SUITES:
            if any(task.name == name for task in get_suite(suite).tasks):
                raise UsageError(f'unknown task "{name}"; it belongs to the suite {suite}: add --suite {suite}')
        near = suggest(name, [*own, *known], "lm-eval ls tasks")
        raise UsageError(f'unknown task "{name}"; {near}')
