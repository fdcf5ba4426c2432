"""Builds the error for tasks that cannot be loaded: lists all of them, with their data and how to get it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from eval.tasks.task import Task
from merge.checkpoint.network import no_network
from merge.errors import MergeError, first_line


def unloadable(missing: Sequence[tuple[Task, Exception]], known: int) -> MergeError:
    """One error for all tasks that raised when they were loaded.

    Args:
        missing: each with what lm-eval, datasets or the hub raised.
        known: how many other tasks can be loaded.
    """
    lines = [_line(task, error) for task, error in missing]
    data = [task.name for task, error in missing if _is_data(error) or task.needs]
    if data:
        offline = no_network()
        if os.environ.get("HF_DATASETS_OFFLINE") == "1" and offline is None:
            offline = "HF_DATASETS_OFFLINE is set, so nothing is downloaded"
        how = f"{offline}. " if offline else ""
        lines.append(
            f"{how}Where there is a network, download the data (lm-eval run --model dummy --limit 1 --tasks "
            f"{','.join(data)}); it is stored in HF_HOME (~/.cache/huggingface), which can be copied to this machine."
        )
    if known:
        lines.append("The other tasks can be run without them: name them with --tasks, beside --suite.")
    return MergeError("\n".join(lines))


def _line(task: Task, error: Exception) -> str:
    said = first_line(error)
    if isinstance(error, ImportError):
        what = f"a package is not installed ({said.rstrip('.')})"
        if task.extra:
            what = f"{what}; pip install {task.extra}"
        return f"{task.name}: {what}." + (f" It needs the dataset {task.needs}." if task.needs else "")
    if task.nltk and isinstance(error, LookupError):
        name = task.nltk.rpartition("/")[2]
        return f"{task.name}: NLTK's {name} is not installed; python -m nltk.downloader {name}, or copy ~/nltk_data."
    if _is_data(error):
        what = f"the dataset {task.needs}" if task.needs else "its dataset"
        return f"{task.name}: {what} is neither cached nor reachable ({said})."
    return f"{task.name}: cannot be loaded ({type(error).__name__}: {said})."


def _is_data(error: Exception) -> bool:
    """Whether an error comes from a download or a file; a broken configuration raises others."""
    return isinstance(error, (OSError, EOFError))
