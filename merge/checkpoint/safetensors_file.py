"""Reads the header of a safetensors file strictly.

Format: 8 bytes, little-endian: N. N bytes of JSON: {"__metadata__": {str: str}, NAME: {"dtype", "shape",
"data_offsets": [begin, end)}}. Then the data, to which the offsets are relative, without holes or overlaps, to the
last byte of the file. Whatever departs from that is an error: offsets that lie would make wrong numbers, not a crash.

Source: the README of safetensors, "Format".
"""

from __future__ import annotations

import math
import os
import stat
from typing import Any

from merge.checkpoint.plain_header import plain_header
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.jsontext import parse_json
from merge.limits import name_error, shape_error
from merge.plan import Stored
from merge.quoting import quoted

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_BYTES = 2**63 - 1
_AGAIN = "Download the file again."


def read_header(path: str) -> tuple[list[Stored], dict[str, str]]:
    """Tensors, in the order of their bytes, and metadata of a safetensors file; only the header is read.

    Raises:
        CheckpointError: anything at all is wrong with the header.
    """
    text, data_start, file_size = _header_text(path)
    if (plain := plain_header(text, path, data_start, file_size - data_start)) is not None:
        return plain
    header = _parse(path, text)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    found = [(*_offsets(path, name, info), name, info) for name, info in header.items()]
    found.sort(key=lambda item: item[:2])  # stable: tensors without elements stay in the header's order
    refs = []
    for begin, end, name, info in found:
        dtype = _dtype(path, name, info)
        shape = _shape(path, name, info, dtype)
        ref = Stored(name, dtype, shape, path, data_start + begin)
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != expected:
            raise _wrong(
                path, name, f"{dtype} {quoted(list(shape))}: expected {expected:,} bytes, found {end - begin:,}"
            )
        refs.append(ref)
    _check_cover(path, [(begin, end, name) for begin, end, name, _ in found], file_size - data_start)
    return refs, metadata


def _header_text(path: str) -> tuple[str, int, int]:
    """The header's JSON, the byte where the data begins, and the file's size."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise CheckpointError(f"{path}: is not a regular file.")
        with open(path, "rb", buffering=0) as file:
            file_size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(MAX_HEADER_BYTES, file_size - 8):
                raise CheckpointError(f"{path}: {_no_header(first + file.read(32), length, file_size)}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if len(raw) < length:
        raise CheckpointError(f"{path}: expected a header of {length:,} bytes, read {len(raw):,}. {_AGAIN}")
    try:
        return raw.decode("utf-8"), 8 + length, file_size
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: header is not UTF-8 text ({error.reason}, byte {error.start}). {_AGAIN}"
        ) from None


def _no_header(first: bytes, length: int, file_size: int) -> str:
    """Why the first bytes cannot be those of a safetensors file."""
    if not first:
        return f"is empty (0 bytes). {_AGAIN}"
    if hint := looks_like(first):
        return hint
    if file_size < 8:
        return f"is only {file_size} bytes long; a safetensors file has at least 8. {_AGAIN}"
    if length > file_size - 8:
        return f"header length {length:,} goes beyond the file, which has {file_size:,} bytes. {_AGAIN}"
    return f"header length {length:,} is more than the allowed {MAX_HEADER_BYTES:,} bytes. {_AGAIN}"


def looks_like(first: bytes) -> str | None:
    """What the file seems to be instead of safetensors, and what to do."""
    if first.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights. Run `git lfs pull` in its directory."
    if first.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a torch pickle with the wrong name. Rename it to pytorch_model.bin."
    if first.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "is a web page, not weights. Download the file again, signed in if the model asks for it."
    if first.startswith(b"GGUF"):
        return "is a GGUF file with the wrong name. Convert it to safetensors."
    return None


def _parse(path: str, text: str) -> dict[str, Any]:
    try:
        header = parse_json(text, unique=True, is_text=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: header {error}. {_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, expected an object. {_AGAIN}")
    if not text.startswith("{"):
        raise CheckpointError(f'{path}: header begins with {quoted(text[0])}, expected "{{". {_AGAIN}')
    if wrong := name_error(max(header, key=len, default="")):
        raise CheckpointError(f"{path}: {wrong}. The header is damaged: download the file again.")
    return header


def _metadata(path: str, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected an object of strings. {_AGAIN}")
    return metadata


def _offsets(path: str, name: str, info: Any) -> tuple[int, int]:
    if not isinstance(info, dict):
        raise _wrong(path, name, f"expected an object with dtype, shape and data_offsets, found {quoted(info)}")
    offsets = info.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise _wrong(path, name, f"data_offsets: expected two integers, found {quoted(offsets)}")
    begin, end = offsets
    if begin < 0 or end > _MAX_BYTES:
        raise _wrong(path, name, f"data_offsets {quoted(offsets)} are negative or too large for any file")
    if end < begin:
        raise _wrong(path, name, f"data_offsets decrease from {quoted(begin)} to {quoted(end)}")
    return begin, end


def _dtype(path: str, name: str, info: dict[str, Any]) -> str:
    dtype = info.get("dtype")
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    if isinstance(dtype, str) and dtype.startswith(("F4", "F6", "I4", "U4")):
        raise CheckpointError(
            f"{path}: {name}: dtype {dtype} packs several values into a byte and is not read. "
            "Dequantise the model first, or name the original."
        )
    raise CheckpointError(
        f"{path}: {name}: unknown dtype {quoted(dtype)}. Known: {', '.join(DTYPES)}. Convert the tensor, or download "
        "the file again."
    )


def _shape(path: str, name: str, info: dict[str, Any], dtype: str) -> tuple[int, ...]:
    shape = info.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise _wrong(path, name, f"shape: expected a list of integers that are not negative, found {quoted(shape)}")
    if wrong := shape_error(shape, dtype):
        raise _wrong(path, name, wrong)
    return tuple(shape)


def _check_cover(path: str, spans: list[tuple[int, int, str]], data_size: int) -> None:
    """Checks that the tensors' bytes fill the file without overlap or hole."""
    last = max((end for _, end, _ in spans), default=0)
    if last > data_size:
        name = next(name for _, end, name in spans if end > data_size)
        raise CheckpointError(
            f"{path}: {name}: goes beyond the end of the file: truncated, {last - data_size:,} bytes are missing "
            f"(expected {last:,} bytes of data, found {data_size:,}). {_AGAIN}"
        )
    place, before = 0, "the header"
    for begin, end, name in spans:
        if begin < place:
            raise _wrong(path, name, f"overlaps {before} by {min(place, end) - begin:,} bytes (data_offsets)")
        if begin > place:
            raise _wrong(path, name, f"a hole of {begin - place:,} bytes between {before} and this tensor")
        place, before = end, name
    if place < data_size:
        raise CheckpointError(f"{path}: {data_size - place:,} trailing bytes after the last tensor, {before}. {_AGAIN}")


def _wrong(path: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name}: {what}. The header is damaged: download the file again.")
