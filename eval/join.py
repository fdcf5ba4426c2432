"""Joins results files with the same tasks and settings and different models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from eval.results import ModelScores, Results
from merge.errors import UsageError
from merge.quoting import quoted

# Settings that may differ: they change only the speed, or each task records them itself.
_FREE = ("batch_size", "device", "dtype", "backend", "model_args", "samples", "include", "unsafe_code", "trusted_code")
_NUMBERS = ("backend", "model_args", "dtype")  # settings that change the answers of the same weights


def join(files: Sequence[tuple[Path, Results]]) -> tuple[Results, tuple[str, ...]]:
    """One Results of all models, on the tasks that all files have, and notes on what was left out.

    Raises:
        UsageError: no task in common, or tasks with different versions, samples or numbers of examples.
    """
    first_path, first = files[0]
    tasks = tuple(name for name in first.tasks if all(name in other.tasks for _, other in files))
    if not tasks:
        raise UsageError(f"{', '.join(str(path) for path, _ in files)}: no task is in all of them.")
    notes = []
    for path, other in files:
        _check_alike(first_path, first, path, other, tasks)
        if left := [name for name in other.tasks if name not in tasks]:
            notes.append(f"{path}: {', '.join(left)} left out: not in all files.")
    models: list[ModelScores] = []
    judged = set()
    for path, other in files:
        how = [str(other.settings.get(key)) for key in _NUMBERS]
        for model in other.models:
            key = (model.name, model.digest, *how)
            if key in judged:
                continue  # in both
            judged.add(key)
            taken = any(model.name == known.name for known in models)
            models.append(dataclasses.replace(model, name=f"{model.name} ({path.stem})") if taken else model)
    questions = {name: asked for _, other in files for name, asked in other.questions.items()}
    line = first.path if len(files) == 1 else ()
    return dataclasses.replace(first, models=tuple(models), tasks=tasks, questions=questions, path=line), tuple(notes)


def _check_alike(first_path: Path, first: Results, path: Path, other: Results, tasks: Sequence[str]) -> None:
    for key, value in first.settings.items():
        if key not in _FREE and other.settings.get(key) != value:
            raise UsageError(
                f"{path}: {key} is {quoted(other.settings.get(key))}, in {first_path} {quoted(value)}: not the same "
                "evaluation. Run merge eval again with the same options; stored answers are reused."
            )
    for name in tasks:
        mine, theirs = (next(iter(each.models)).tasks[name] for each in (first, other))
        for what, a, b in (("version", mine.version, theirs.version), ("metric", mine.metric, theirs.metric)):
            if a != b:
                raise UsageError(f"{path}: task {name} has {what} {b}, in {first_path} {a}: they cannot be compared.")
        if mine.doc_ids != theirs.doc_ids:
            raise UsageError(f"{path}: task {name} has other items than in {first_path}: they cannot be compared.")
