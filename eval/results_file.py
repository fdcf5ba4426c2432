"""Reads and checks a results file of `merge eval -o`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.results import FORMAT, ModelScores, Results, TaskResult
from eval.samples import as_pairs
from merge.codec import decode
from merge.errors import UsageError, first_line
from merge.jsontext import parse_json
from merge.quoting import quoted

_ABSURD = 1e100  # its square is still a float64


def load_results(path: Path) -> Results:
    """Raises UsageError, with the reason, for a file that is not valid."""
    try:
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict) or (number := data.pop("format", None)) is None:
            raise ValueError("no format")
        if number != FORMAT:
            raise ValueError(f"format {quoted(number)}, expected {FORMAT}")
        found = decode(data, Results)
        if not found.models:
            raise ValueError("no model")
        for model in found.models:
            for problem in _problems(model, found.tasks):
                raise ValueError(f"{quoted(model.name)}: {problem}")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UsageError(f"{path}: holds no results of merge eval ({first_line(error)}).") from None
    return found


def _problems(model: ModelScores, shown: tuple[str, ...]) -> Iterator[str]:
    for name in shown:
        if name not in model.tasks:
            yield f"has no score of {quoted(name)}"
    for name, task in model.tasks.items():
        for part in task.parts:
            if part.task not in model.tasks:
                yield f"{quoted(name)} has a part {quoted(part.task)}, which is not there"
        if task.name != name or task.metric not in task.metrics or _is_own_group(task, model):
            yield f"the entry {quoted(name)} contradicts itself"
        for items in (task.items, *task.also.values()):
            if len(items) not in (0, len(task.doc_ids)):
                yield f"{quoted(name)} has {len(items)} scores of {len(task.doc_ids)} items"
        yield from _absurd(task)


def _is_own_group(task: TaskResult, model: ModelScores) -> bool:
    """Whether its groups form a cycle."""
    seen = {task.name}
    while task.group is not None and task.group in model.tasks:
        task = model.tasks[task.group]
        if task.name in seen:
            return True
        seen.add(task.name)
    return False


def _absurd(task: TaskResult) -> Iterator[str]:
    for items in (task.items, *task.also.values()):
        pairs = as_pairs(items)
        if not (np.abs(pairs) < _ABSURD).all() or not (pairs[:, 1] > 0).all():
            yield f"{quoted(task.name)} has an item whose score is not a number, or absurd"
    if not abs(task.metrics.get(task.metric, 0.0)) < _ABSURD:
        yield f"{quoted(task.name)} has a score that is not a number, or absurd"
    if not all(0 <= part.chance < 1 for part in task.parts):
        yield f"{quoted(task.name)} has a part whose chance is not between 0 and 1"
