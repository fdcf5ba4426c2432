"""Reads a torch checkpoint (.bin) without torch: names, shapes and offsets of its tensors.

Two formats, both written by torch.save: a zip whose records are stored uncompressed, ARCHIVE/data.pkl (the objects) and
ARCHIVE/data/KEY (a storage each); and, before torch 1.6, five pickles in a row followed by the storages, each as an
8-byte count of elements and the bytes. In both, tensors are stored uncompressed, so they can be read in pieces.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any

from merge.checkpoint.safetensors_file import looks_like
from merge.checkpoint.unpickler import MAX_PICKLE_BYTES, Storage, StoredTensor, load
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.limits import name_error, shape_error
from merge.plan import Stored, TensorRef
from merge.quoting import clipped, quoted, some
from merge.sources.view import strided

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_AGAIN = "Download the file again."
_NESTS = ("state_dict", "model_state_dict", "model", "module")
_Find = Callable[[str], tuple[int, int]]  # a storage's key -> the byte where it begins, its bytes
_PLAIN = (type(None), bool, int, float, str, bytes)
_MAX_EXPANDED = 2**20  # bytes that a tensor of stride 0 may have beyond its file
_MAX_LIST_BYTES = 16 * 2**20  # of a zip's list of records: 200,000 of them


def read_pickle(path: str) -> tuple[list[TensorRef], list[str]]:
    """Tensors in the dictionary's order, and notes on what was left out. No code in the file is run.

    Raises:
        CheckpointError: damaged, compressed, too large, or with anything in it that is not weights.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            first = file.read(64)
            file.seek(0)
            if first.startswith(b"PK"):
                value, find = _read_zip(path, file, file_size)
            elif first.startswith(b"\x80"):
                value, find = _read_legacy(path, file, file_size)
            else:
                raise CheckpointError(f"{path}: {_not_torch(first)}")
            tensors, notes = _state_dict(path, value)
            places = {key: find(key) for key in dict.fromkeys(tensor.storage.key for tensor in tensors.values())}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    return [_ref(path, name, tensor, places, file_size) for name, tensor in tensors.items()], notes


def _not_torch(first: bytes) -> str:
    if not first:
        return f"is empty (0 bytes). {_AGAIN}"
    if hint := looks_like(first):
        return hint
    return f"is not a torch checkpoint (begins with {quoted(first[:8])}, expected a zip or a pickle). {_AGAIN}"


# --- zip ---------------------------------------------------------------------------------------------------------


class _ShortReads:
    """Limits the list of records, which zipfile reads at once and turns into 600 bytes of objects each."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1, /) -> bytes:
        if size > _MAX_LIST_BYTES:
            raise zipfile.BadZipFile(f"its list of records has {size:,} bytes; at most {_MAX_LIST_BYTES:,} are read")
        return self._read(size)


class _ZipPlaces:
    """The storages of a zip: KEY -> (byte, length)."""

    def __init__(self, path: str, file: IO[bytes], file_size: int) -> None:
        self._path, self._file, self._size = path, file, file_size
        try:
            entries = zipfile.ZipFile(_ShortReads(file)).infolist()
        except OSError:
            raise
        except Exception as error:  # BadZipFile, and the errors of damaged lengths
            raise CheckpointError(f"{path}: the zip is truncated or damaged ({error}). {_AGAIN}") from None
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise CheckpointError(f"{path}: the zip has two records of one name. {_AGAIN}")
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: is a zip but not a torch checkpoint (no data.pkl in it). {_AGAIN}")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in self._entries:
            raise CheckpointError(f"{path}: is a TorchScript program, not weights. Save its state_dict as safetensors.")

    def find(self, record: str) -> tuple[int, int]:
        """(first byte, number of bytes) of ARCHIVE/record."""
        name = f"{self._folder}{record}"
        entry = self._entries.get(name)
        name = clipped(name)
        if entry is None:
            raise CheckpointError(f"{self._path}: the record {name} is not in the zip. {_AGAIN}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{self._path}: the record {name} is compressed or encrypted; expected stored. "
                "Save the model with torch.save."
            )
        is_there = 0 <= entry.header_offset < self._size
        self._file.seek(entry.header_offset if is_there else self._size)
        local = self._file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self._path}: the record {name} is not where the zip says. {_AGAIN}")
        name_size, extra_size = struct.unpack("<HH", local[26:30])
        begin = entry.header_offset + 30 + name_size + extra_size
        if begin + entry.file_size > self._size:
            raise CheckpointError(
                f"{self._path}: the record {name} goes beyond the end of the file: truncated, "
                f"{begin + entry.file_size - self._size:,} bytes are missing. {_AGAIN}"
            )
        return begin, entry.file_size

    def small(self, record: str, limit: int) -> int:
        """Seeks to a record that is read at once, and returns its size."""
        begin, size = self.find(record)
        if size > limit:
            raise CheckpointError(f"{self._path}: {record} has {size:,} bytes; at most {limit:,} are read. {_AGAIN}")
        self._file.seek(begin)
        return size

    def has(self, record: str) -> bool:
        return f"{self._folder}{record}" in self._entries


def _read_zip(path: str, file: IO[bytes], file_size: int) -> tuple[object, _Find]:
    places = _ZipPlaces(path, file, file_size)
    if places.has("byteorder"):
        order = file.read(places.small("byteorder", 64))
        if order != b"little":
            raise CheckpointError(
                f"{path}: byte order {order.decode('ascii', 'replace')}; expected little. Convert it."
            )
    value = load(path, file, places.small("data.pkl", MAX_PICKLE_BYTES))
    return value, lambda key: places.find(f"data/{key}")


# --- the format before torch 1.6 ---------------------------------------------------------------------------------


def _read_legacy(path: str, file: IO[bytes], file_size: int) -> tuple[object, _Find]:
    magic = load(path, file, 1024)
    if magic != _LEGACY_MAGIC or load(path, file, 1024) != _LEGACY_PROTOCOL:
        raise CheckpointError(f"{path}: is a pickle but not a torch checkpoint (wrong magic number). {_AGAIN}")
    system = load(path, file, 65536)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: byte order big; expected little. Convert it.")
    storages: dict[str, Storage] = {}
    value = load(path, file, storages=storages)
    keys = load(path, file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: its list of storages is damaged. {_AGAIN}")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in places:
            raise CheckpointError(f"{path}: storage {clipped(key)} belongs to no tensor, or is there twice. {_AGAIN}")
        count = file.read(8)
        begin, size = file.tell(), storage.numel * _item_size(storage)
        missing = 8 - len(count) + max(0, begin + size - file_size)
        if missing:
            raise CheckpointError(
                f"{path}: storage {clipped(key)} goes beyond the end of the file: truncated, at least {missing:,} "
                f"bytes are missing. {_AGAIN}"
            )
        found = int.from_bytes(count, "little", signed=True)
        if found != storage.numel:
            raise CheckpointError(
                f"{path}: storage {clipped(key)}: expected {storage.numel:,} elements, found {found:,}. {_AGAIN}"
            )
        places[key] = (begin, size)
        file.seek(size, os.SEEK_CUR)

    def find(key: str) -> tuple[int, int]:
        if key not in places:
            raise CheckpointError(f"{path}: storage {clipped(key)} is not in the file. {_AGAIN}")
        return places[key]

    return value, find


def _item_size(storage: Storage) -> int:
    return 1 if storage.dtype is None else DTYPES[storage.dtype].itemsize


# --- both --------------------------------------------------------------------------------------------------------


def _state_dict(path: str, value: Any) -> tuple[dict[str, StoredTensor], list[str]]:
    """The dictionary of tensors, which may be nested under a usual name, and what was left out."""
    notes: list[str] = []
    for _ in _NESTS:
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a dictionary of tensors.")
        nest = next((key for key in _NESTS if isinstance(value.get(key), dict)), None)
        if nest is None or any(isinstance(item, StoredTensor) for item in value.values()):
            break
        others = [str(key) for key in value if key != nest]
        notes.extend([f"{path}: read {nest}; left out {some(others)}"] if others else [])
        value = value[nest]
    tensors: dict[str, StoredTensor] = {}
    ignored = []
    for name, item in value.items():
        if name == "__metadata__":
            raise CheckpointError(f"{path}: {name}: safetensors keeps this name for itself. Rename the tensor.")
        if isinstance(item, StoredTensor) and isinstance(name, str):
            tensors[name] = item
        elif isinstance(item, _PLAIN):
            ignored.append(str(name))
        else:
            raise CheckpointError(
                f"{path}: {quoted(name)}: expected a tensor, found a {type(item).__name__}. "
                "Save the model's state_dict."
            )
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors in it. Save the model's state_dict.")
    notes.extend([f"{path}: left out {some(ignored)}: plain values, not tensors"] if ignored else [])
    return tensors, notes


def _ref(path: str, name: str, tensor: StoredTensor, places: dict[str, tuple[int, int]], file_size: int) -> TensorRef:
    """Checks the tensor against its storage, and the storage against the file."""
    if wrong := name_error(name) or shape_error(tensor.shape, tensor.dtype):
        raise CheckpointError(f"{path}: {name}: {wrong}. {_AGAIN}")
    storage, item_size = tensor.storage, DTYPES[tensor.dtype].itemsize
    begin, size = places[storage.key]
    if size != storage.numel * _item_size(storage):
        raise CheckpointError(
            f"{path}: {name}: storage {clipped(storage.key)}: expected {storage.numel * _item_size(storage):,} bytes, "
            f"found {size:,}. {_AGAIN}"
        )
    first = storage.first * _item_size(storage) + tensor.first * item_size
    extent = 0
    if 0 not in tensor.shape:
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if extent and first + extent * item_size > size:
        raise CheckpointError(
            f"{path}: {name}: shape {quoted(list(tensor.shape))}, strides {quoted(list(tensor.strides))} go beyond its "
            f"storage ({first + extent * item_size:,} bytes of {size:,}). {_AGAIN}"
        )
    if (total := math.prod(tensor.shape) * item_size) > max(file_size, _MAX_EXPANDED):
        raise CheckpointError(
            f"{path}: {name}: shape {quoted(list(tensor.shape))} repeats its storage to {total:,} bytes, and the file "
            f"has {file_size:,}. Save the tensor contiguous."
        )
    first_element = Stored(name, tensor.dtype, tensor.shape, path, begin + (first if extent else 0))
    return strided(first_element, tensor.strides)
