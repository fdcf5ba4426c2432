"""Identity of unfinished work: a digest of the plan without paths and times, and the state of its files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from merge.plan import Plan, SideFile, SourceFile, SourceModel, Stored


def source_files(plan: Plan) -> tuple[SourceFile, ...]:
    """Every file whose tensors a plan or its stages read, each once, in a fixed order."""
    plans = (plan, *plan.stages)
    files = [*plan.statistics_files, *(file for each in plans for model in each.models for file in model.files)]
    return tuple({file.path: file for file in files}.values())


def stamps(plan: Plan) -> list[list[Any]]:
    """The state of each of source_files when the plan was made; it changes whenever the file does."""
    return [[file.made_from] if file.made_from else list(file.stamp) for file in source_files(plan)]


def plan_digest(plan: Plan) -> str:
    """SHA-256 of everything that a plan does. Files are numbered; their paths and times are left out, so a model may be
    moved or copied."""
    names = {file.path: f"file {number}" for number, file in enumerate(source_files(plan))}
    text = json.dumps(_plain(plan, names), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


_ATOMS = frozenset((str, int, float, bool, type(None)))


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _plain(value: Any, names: dict[str, str]) -> Any:
    """For JSON: a dataclass as the list of its fields."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is Stored:
        return [value.name, value.dtype, value.shape, names.get(value.file, value.file), value.offset]
    if isinstance(value, (list, tuple)):
        return [_plain(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, names) for key, item in value.items()}
    if isinstance(value, SourceFile):
        return [names[value.path], value.size, value.made_from]
    if isinstance(value, SourceModel):
        return [value.ref, value.revision, _plain(value.files, names)]
    if isinstance(value, SideFile):
        return [value.name, value.source and os.path.basename(value.source), value.text]
    if dataclasses.is_dataclass(kind):
        return [_plain(getattr(value, name), names) for name in _fields(kind)]
    return value
