"""The header of a GGUF file: metadata, and where each tensor's blocks lie. Nothing in it is believed without a check.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from merge.errors import CheckpointError
from merge.quoting import quoted

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_BYTES = 1 << 28  # of a header; vocabularies of 256,000 tokens with their merges take 15 MB
_MOST_ELEMENTS = 1 << 22  # of an array
_MOST_DIMENSIONS, _MOST_TENSORS, _MOST_KEYS = 4, 1_000_000, 100_000


@dataclass(frozen=True)
class GgufEntry:
    """A tensor: `shape` as in torch, `kind` the number of its type, `offset` its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: tuple[GgufEntry, ...]


def read_gguf_header(path: str) -> GgufHeader:
    """Raises CheckpointError for a file that is damaged, or too large in what it claims."""
    try:
        with open(path, "rb") as file:
            return _Parser(file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (_DamagedGguf, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(f"{path}: is no GGUF file that can be read ({error}). Download the file again.") from None


class _DamagedGguf(Exception):
    """What is wrong with a header."""


class _Parser:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise _DamagedGguf("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise _DamagedGguf(f"version {version}, expected 2 or 3, little-endian")
        n_tensors, n_keys = self._count(_MOST_TENSORS), self._count(_MOST_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in metadata:
                raise _DamagedGguf(f"key {quoted(key)} stands twice")
            metadata[key] = self._value(self._number("I"))
        infos = [self._info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise _DamagedGguf(f"alignment {quoted(str(alignment))}")
        start = -(-self._at // alignment) * alignment
        entries = tuple(GgufEntry(name, shape, kind, start + offset) for name, shape, kind, offset in infos)
        if len({entry.name for entry in entries}) < len(entries):
            raise _DamagedGguf("two tensors have one name")
        return GgufHeader(metadata, entries)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n = self._number("I")
        if not 1 <= n <= _MOST_DIMENSIONS:
            raise _DamagedGguf(f"{quoted(name)} has {n} dimensions")
        shape = tuple(self._number("Q") for _ in range(n))[::-1]
        if math.prod(shape) >= 1 << 48 or 0 in shape:
            raise _DamagedGguf(f"{quoted(name)} has the shape {list(shape)}")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise _DamagedGguf(f"a value of type {kind}")
        inner, n = self._number("I"), self._count(_MOST_ELEMENTS)
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{n}{code}", self._take(n * struct.calcsize(f"<{code}"))))
        if inner == _STRING:
            return [self._string() for _ in range(n)]
        raise _DamagedGguf(f"an array of type {inner}")

    def _string(self) -> str:
        return self._take(self._count(_MOST_BYTES)).decode("utf-8")

    def _count(self, most: int) -> int:
        n = int(self._number("Q"))
        if n > most:
            raise _DamagedGguf(f"a count of {n:,}, at most {most:,} expected")
        return n

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, n: int) -> bytes:
        self._at += n
        if self._at > self._size or self._at > _MOST_BYTES:
            raise _DamagedGguf("it ends within its header" if self._at > self._size else "its header is too large")
        return self._file.read(n)
