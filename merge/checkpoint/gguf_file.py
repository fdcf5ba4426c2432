"""Tensors of a GGUF file under the names of transformers, decoded while they are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from merge.checkpoint.gguf_header import GgufEntry, GgufHeader, read_gguf_header
from merge.errors import CheckpointError
from merge.gguf_layouts import LAYER, OUTER, Family, family_named
from merge.needs import need
from merge.plan import Derived, Stored, TensorRef
from merge.quoting import quoted, some
from merge.sources.gguf_rows import gguf_rows, row_bytes

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")
_COMPUTED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")  # follow from the config
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


def read_gguf(path: str) -> tuple[list[TensorRef], list[str]]:
    """Its tensors, and notes.

    Raises:
        CheckpointError: damaged, or of a type or name that is not known.
        UsageError: the package gguf is missing, or the architecture is not known.
    """
    need(f"{path}: a GGUF file", "gguf", "gguf")
    header = read_gguf_header(path)
    family = family_named(str(header.metadata.get("general.architecture")), path)
    heads = _head_dim(header.metadata, family.arch)
    found: list[TensorRef] = []
    unknown: list[str] = []
    kinds: dict[str, int] = {}
    _check_places(path, header)
    for entry in header.tensors:
        kind = _kind(path, entry)
        kinds[kind] = kinds.get(kind, 0) + 1
        if _COMPUTED.fullmatch(entry.name):
            continue
        name = _name(entry.name, family)
        if name is None:
            unknown.append(entry.name)
            continue
        head = heads if family.rotates(name) else 0
        found += _tensors(path, entry, kind, name, head, 0.0 - family.added(name))  # never -0.0
    if unknown:
        raise CheckpointError(f"{path}: {some(unknown)}: not tensors of {family.arch} as it is known here.")
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return found, [f"GGUF with {listed}; what quantising lost stays lost"]


def _check_places(path: str, header: GgufHeader) -> None:
    """Raises CheckpointError if tensors overlap, or lie beyond the end of the file."""
    size, end, before = os.path.getsize(path), 0, ""
    for entry in sorted(header.tensors, key=lambda entry: entry.offset):
        if entry.offset < end:
            raise CheckpointError(
                f"{path}: {quoted(entry.name)} and {quoted(before)} overlap. Download the file again."
            )
        nbytes = row_bytes(entry.shape[-1], _kind(path, entry)) * math.prod(entry.shape[:-1])
        end, before = entry.offset + nbytes, entry.name
        if end > size:
            raise CheckpointError(
                f"{path}: {quoted(entry.name)}: expected {end:,} bytes in the file, found {size:,}. Download it again."
            )


def _tensors(path: str, entry: GgufEntry, kind: str, name: str, head: int, add: float) -> Iterator[TensorRef]:
    """One, or one for each expert."""
    if "{e}" not in name:
        yield _tensor(path, entry.shape, entry.offset, kind, name, head, add)
        return
    size = row_bytes(entry.shape[-1], kind) * entry.shape[-2]
    for expert in range(entry.shape[0]):
        offset = entry.offset + expert * size
        yield _tensor(path, entry.shape[1:], offset, kind, name.replace("{e}", str(expert)), 0, 0.0)


def _tensor(
    path: str, shape: tuple[int, ...], offset: int, kind: str, name: str, head: int, add: float
) -> Stored | Derived:
    if kind in _PLAIN and not head and not add:
        return Stored(name, _PLAIN[kind], shape, path, offset)
    return gguf_rows(name, shape, path, offset, kind, head, add)


def _kind(path: str, entry: GgufEntry) -> str:
    from gguf import GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(entry.kind)
    except ValueError:
        raise CheckpointError(f"{path}: {quoted(entry.name)}: type {entry.kind} is not known here.") from None
    if kind.name not in _PLAIN and kind not in quants._type_traits:
        raise CheckpointError(f"{path}: {quoted(entry.name)}: {kind.name} cannot be decoded. Name the original model.")
    try:
        row_bytes(entry.shape[-1], kind.name)
    except ValueError as error:
        raise CheckpointError(f"{path}: {quoted(entry.name)}: {error}. Download the file again.") from None
    return str(kind.name)


def _name(name: str, family: Family) -> str | None:
    if match := _BLOCK.fullmatch(name):
        inner = (LAYER | dict(family.names)).get(match[2])
        return inner and f"model.layers.{match[1]}.{inner}.{match[3]}"
    match = _OUTER.fullmatch(name)
    outer = OUTER.get(match[1]) if match else None
    return f"{outer}.{match[2]}" if match and outer else None


def _head_dim(metadata: dict[str, object], arch: str) -> int:
    length = metadata.get(f"{arch}.attention.key_length")
    if isinstance(length, int):
        return length
    heads, hidden = metadata.get(f"{arch}.attention.head_count"), metadata.get(f"{arch}.embedding_length")
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else 0
