"""From what a command is asked to who judges: tasks, or a function in a file of Python."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.memory import Memory, default_path
from eval.search.judges import FunctionJudge, Judge, TaskJudge, refuse_test_sets
from eval.settings import Settings
from eval.tasks.task import Task
from merge.errors import MergeError, UsageError, first_line


@contextlib.contextmanager
def judge_of_tasks(
    tasks: Sequence[Task],
    settings: Settings,
    cache: Path | None,
    share: float,
    *,
    allow_test_set: bool = False,
    metrics: Mapping[str, str] | None = None,
) -> Iterator[tuple[Judge, tuple[str, ...]]]:
    """The judge, and the tasks that are test sets of leaderboards.

    Args:
        cache: the file of remembered answers; None: the user's.
        share: of the items that the search may use.
        metrics: of tasks, by their names, in lm-eval's words.

    Raises:
        UsageError: test sets that are not allowed.
    """
    test_sets = refuse_test_sets(tasks, allow_test_set)
    chosen = [dataclasses.replace(task, metric=(metrics or {}).get(task.name, task.metric)) for task in tasks]
    with Memory(cache or default_path()) as memory:
        yield TaskJudge(chosen, settings, memory, share), test_sets


@contextlib.contextmanager
def judge_of_divergence(
    model: str, data: Path | None, settings: Settings, cache: Path | None, share: float
) -> Iterator[Judge]:
    """The judge of the KL divergence from a model on a text. Raises UsageError where there is no text."""
    from eval.search.divergence import DivergenceJudge

    if data is None:
        raise UsageError("--kl-from: needs a text, --data FILE.")
    with Memory(cache or default_path()) as memory:
        yield DivergenceJudge(model, data, settings, memory, share)


def function_of(text: str) -> FunctionJudge:
    """`FILE.py:NAME` -> the judge that calls it. Tasks: `NAME.tasks`, a sequence of names, where it gives a mapping.

    Raises:
        UsageError: no such file or function; a file that fails.
    """
    file, _, name = text.rpartition(":")
    if not file or not name.isidentifier():
        raise UsageError(f'--objective "{text}": expected FILE.py:NAME.')
    module = types.ModuleType(Path(file).stem)
    module.__file__ = file
    try:
        exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), module.__dict__)
    except OSError as error:
        raise UsageError(f"--objective {file}: cannot be read ({error.strerror}).") from None
    except MergeError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"--objective {file}: {type(error).__name__}: {first_line(error)}.") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"--objective {file}: has no function {name}.")
    return FunctionJudge(found, tuple(getattr(found, "tasks", ())))
