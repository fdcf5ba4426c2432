"""SourceReader: reads elements of source tensors with bounded reads; files must not change meanwhile.

Nothing is mapped: mapped pages would count as resident memory, and a file cut short would kill the process.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.checkpoint.unchanged import check_unchanged, compare, gone
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.errors import CheckpointError, SourceChanged
from merge.plan import Derived, SourceFile, Stored, TensorRef
from merge.sources import FOUND, Fill, operation

if sys.platform != "win32":
    import resource  # imported here, because no module can be loaded once file descriptors have run out

_READ_BYTES = 1 << 26  # at most this much a system call; Linux itself stops at 2 GiB
_WINDOW, _WINDOWS = 1 << 16, 1 << 22  # bytes that are read for a small tensor, and of all files for a thread
_AHEAD = 16 << 20  # bytes asked for at once where tensors are small


class SourceReader:
    """Reads from a fixed set of files. Any number of threads may read; one closes, when none reads.

    Raises, from every method that reads: CheckpointError if the bytes cannot be read; SourceChanged if the file is not
    the one the plan was made from; ValueError for a file or range that the plan does not have.
    """

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._files = {file.path: file for file in files}
        self._descriptors: dict[str, int] = {}
        self._found: dict[str, npt.NDArray[Any]] = {}
        self._lock = threading.Lock()
        self._seek_lock = threading.Lock()
        self._read_at = best_read(self._seek_lock)
        self._derived: dict[int, _Prepared] = {}  # by id: a ref may be large, and hashing it slow
        self._derive_lock = threading.Lock()
        self._asked: dict[str, tuple[int, int]] = {}  # the part of each file that was last read ahead
        self._windows = _Windows()
        self._window = min(_WINDOW, _WINDOWS // max(1, len(self._files)))
        self._closed = False

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read_into(self, ref: TensorRef, start: int, out: npt.NDArray[np.generic]) -> None:
        """Elements start.. of the flattened tensor -> out (n,), contiguous, of the tensor's storage dtype's width."""
        item_size = DTYPES[ref.dtype].itemsize
        if out.ndim != 1 or not out.flags.c_contiguous or out.itemsize != item_size:
            raise ValueError(
                f"out: expected a contiguous vector of {item_size}-byte elements, found {out.dtype} {out.shape}"
            )
        if start < 0 or start + len(out) > ref.size:
            raise ValueError(f"{ref.name}: elements {start}..{start + len(out)} of {ref.size}")

        if isinstance(ref, Stored):
            self._fill(ref, ref.offset + start * item_size, out)
        elif isinstance(ref, Derived) and ref.is_exact:
            self._computed(ref)(start, out)  # type: ignore[arg-type]
        else:
            raise ValueError(f"{ref.name}: is computed, and has values, no elements of {ref.dtype}")

    def read_values(self, ref: TensorRef, start: int, out: npt.NDArray[Any]) -> None:
        """Elements start.. of the flattened tensor, stored or derived -> out (n,) float32; float64 is rounded to it.

        Integers are read as they are stored, if `out` is of their dtype.
        """
        if start < 0 or start + len(out) > ref.size:
            raise ValueError(f"{ref.name}: elements {start}..{start + len(out)} of {ref.size}")
        if isinstance(ref, Derived) and not ref.is_exact:
            self._computed(ref)(start, out)
            return
        dtype = DTYPES[ref.dtype]
        if not dtype.is_float and out.dtype == dtype.numpy_name:
            self.read_into(ref, start, out)
            return
        raw = np.empty(len(out), dtype.numpy_name)
        self.read_into(ref, start, raw)
        if ref.dtype == "F64":
            with np.errstate(over="ignore"):  # infinity is counted where it is merged
                out[:] = raw
        else:
            to_float32(ref.dtype, raw, out)

    def _computed(self, ref: Derived) -> Fill:
        if ref.operation == FOUND:
            found, first = self._found[ref.parameters["key"]], ref.parameters["start"]
            return lambda start, out: np.copyto(out, found[first + start : first + start + len(out)])
        with self._derive_lock:
            known = self._derived.get(id(ref))
            if known is None:
                known = self._derived[id(ref)] = _Prepared(ref)
        return known.fill(self.read_into if ref.is_exact else self.read_values)

    def release(self, refs: Iterable[TensorRef]) -> None:
        """Frees the memory that derived tensors hold; they can be read again."""
        for ref in refs:
            if isinstance(ref, Derived):
                self._derived.pop(id(ref), None)
                self.release(ref.inputs)

    def supply(self, key: str, values: npt.NDArray[Any]) -> None:
        """Sets numbers (n,) that the run computed, for tensors made of them; see merge.sources.found."""
        self._found[key] = values

    def will_need(self, ref: TensorRef, start: int, count: int) -> None:
        """Asks the system to read `count` elements ahead; does nothing where that is not supported."""
        if isinstance(ref, Stored) and count > 0 and hasattr(os, "posix_fadvise"):
            item_size = DTYPES[ref.dtype].itemsize
            place, size = ref.offset + start * item_size, count * item_size
            os.posix_fadvise(self._descriptor(ref.file), place, size, os.POSIX_FADV_WILLNEED)

    def will_need_next(self, ref: TensorRef) -> None:
        """Asks the system to read ahead after a tensor, once for many tensors."""
        if isinstance(ref, Stored) and hasattr(os, "posix_fadvise"):
            start, end = self._asked.get(ref.file, (0, 0))
            if not start <= ref.offset < end - _AHEAD // 2:
                self._asked[ref.file] = ref.offset, ref.offset + _AHEAD
                os.posix_fadvise(self._descriptor(ref.file), ref.offset, _AHEAD, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self, path: str | None = None) -> None:
        """Raises SourceChanged if one file, or any, has changed since the plan was made."""
        for file in self._files.values() if path is None else (self._files[path],):
            check_unchanged(file)
            descriptor = self._descriptors.get(file.path)
            if descriptor is not None:
                compare(file, os.fstat(descriptor))

    def _fill(self, ref: Stored, place: int, out: npt.NDArray[np.generic]) -> None:
        """Fills out from byte `place` of the tensor's file."""
        view = out.view(np.uint8).data
        if len(view) <= self._window // 4 and ref.nbytes <= self._window // 4 and self._near(ref.file, place, view):
            return
        done, descriptor = 0, self._descriptor(ref.file)
        while done < len(view):
            try:
                count = self._read_at(descriptor, view[done : done + _READ_BYTES], place + done)
            except OSError as error:
                raise CheckpointError(
                    f"{ref.file}: {ref.name}: cannot be read at byte {place + done:,} ({error.strerror or error}). "
                    "Check the disk."
                ) from error
            if count == 0:
                self.check_unchanged(ref.file)
                raise CheckpointError(
                    f"{ref.file}: {ref.name}: the file ends at byte {place + done:,}, "
                    f"{len(view) - done:,} bytes early. Download it again."
                )
            done += count

    def _near(self, path: str, place: int, view: memoryview) -> bool:
        """Bytes of a small tensor, whose neighbours are read with it for later; False if they cannot be had so."""
        windows = self._windows.of
        start, end, data = windows.get(path) or (0, 0, memoryview(bytearray(self._window)))
        if not start <= place <= end - len(view):
            try:
                start, end = place, place + self._read_at(self._descriptor(path), data, place)
            except OSError:
                return False
            windows[path] = start, end, data
            if end - start < len(view):
                return False
        view[:] = data[place - start : place - start + len(view)]
        return True

    def _descriptor(self, path: str) -> int:
        """The open file; opened on first use, and then compared with the plan."""
        found = self._descriptors.get(path)
        if found is not None:
            return found
        with self._lock:
            if path in self._descriptors:
                return self._descriptors[path]
            if self._closed or path not in self._files:
                raise ValueError(f"{path}: {'the reader is closed' if self._closed else 'not a file of this plan'}")
            try:
                descriptor = open_file(path)
            except FileNotFoundError:
                raise gone(path) from None
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be opened ({error.strerror or error}).") from None
            try:
                compare(self._files[path], os.fstat(descriptor))
            except SourceChanged:
                os.close(descriptor)
                raise
            self._descriptors[path] = descriptor
            return descriptor


class _Windows(threading.local):
    """Of each file, the part that this thread read last: (first byte, last, bytes)."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[int, int, memoryview]] = {}


class _Prepared:
    """A derived tensor, prepared by the first thread that reads it."""

    def __init__(self, ref: Derived) -> None:
        self._ref = ref
        self._fill: Fill | None = None
        self._lock = threading.Lock()

    def fill(self, read: Callable[[TensorRef, int, npt.NDArray[Any]], None]) -> Fill:
        with self._lock:
            if self._fill is None:
                self._fill = operation(self._ref).prepare(self._ref, read)
            return self._fill


def open_file(path: str, flags: int = os.O_RDONLY) -> int:
    """A file descriptor; if they have run out, the limit is raised."""
    flags |= getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno != errno.EMFILE or sys.platform == "win32":
            raise
    # Large models have hundreds of shards, and macOS allows 256 open files at first.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, more), hard))
    return os.open(path, flags, 0o644)


def best_read(lock: threading.Lock) -> Callable[[int, memoryview, int], int]:
    """read(descriptor, view, place) -> bytes read; 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return lambda descriptor, view, place: os.preadv(descriptor, [view], place)
    if hasattr(os, "pread"):

        def pread(descriptor: int, view: memoryview, place: int) -> int:
            data = os.pread(descriptor, len(view), place)
            view[: len(data)] = data
            return len(data)

        return pread

    def seek_and_read(descriptor: int, view: memoryview, place: int) -> int:
        with lock:
            os.lseek(descriptor, place, os.SEEK_SET)
            data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    return seek_and_read
