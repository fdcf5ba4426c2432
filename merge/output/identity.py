"""Identity of unfinished work: a digest of the plan without paths and times, and the state of its files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from merge.plan import Plan, SideFile, SourceFile, SourceModel, Step, Stored


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
    digest = hashlib.sha256(b"[")
    for number, field in enumerate(_fields(Plan)):
        digest.update(b"," if number else b"")
        if field == "steps":
            digest.update(b"[")
            for piece in _steps(plan.steps, names):
                digest.update(piece)
            digest.update(b"]")
        else:
            digest.update(_text(_plain(getattr(plan, field), names)))
    digest.update(b"]")
    return digest.hexdigest()


def _text(plain: Any) -> bytes:
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")


def _steps(steps: Sequence[Step], names: dict[str, str]) -> Iterator[bytes]:
    """The same JSON as of `_plain`, a thousand steps at a time, by msgspec where no step has numbers of its own."""
    parameters = {id(step.parameters): step.parameters for step in steps}
    texts = {key: msgspec.Raw(_text(_plain(value, names))) for key, value in parameters.items()}

    def stored(ref: Stored) -> object:
        return ref.name, ref.dtype, ref.shape, names.get(ref.file, ref.file), ref.offset

    def plain(step: Step) -> object:
        sources: Any = step.sources
        if step.statistics or set(map(type, sources)) != {Stored}:
            return msgspec.Raw(_text(_plain(step, names)))
        refs = [stored(ref) for ref in sources]
        base = None if step.base is None else refs.pop(0)
        return (
            *(step.name, step.shape, step.dtype, step.file, step.offset, step.method, refs, step.models, base),
            *(step.base_model, texts[id(step.parameters)], (), step.factor),
        )

    for first in range(0, len(steps), 1000):
        comma = b"," if first else b""
        some = steps[first : first + 1000]
        try:
            yield comma + msgspec.json.encode([plain(step) for step in some])[1:-1]
        except UnicodeEncodeError:  # half a surrogate pair, in a name from a pickle
            yield comma + _text(_plain(some, names))[1:-1]


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
