"""The shards of a result while they are being written: every tensor at its final offset, from any thread or process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from merge.checkpoint.reader import best_read, open_file
from merge.errors import OutputError
from merge.output.directory import explained
from merge.plan import Shard, Step


class ShardFiles:
    """Open shards of one result. Reading and writing are thread-safe; disk errors become OutputError.

    Args:
        partial: the directory that messages name.
        result: where the shards are.
    """

    def __init__(self, partial: Path, result: Path) -> None:
        self._partial, self._result = partial, result
        self._files: dict[str, int] = {}
        self._seek_lock = threading.Lock()
        self._read_at = best_read(self._seek_lock)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def make(self, shard: Shard) -> None:
        """Opens a shard at its full size and writes its header; tensors that are in it already stay. Raises OSError."""
        path = self._result / shard.file
        path.parent.mkdir(exist_ok=True)  # of a module in a folder of its own
        fd = self._files[shard.file] = open_file(os.fspath(path), os.O_RDWR | os.O_CREAT)
        os.truncate(fd, shard.size)  # not fallocate: it makes the later writes several times dearer
        write_at(fd, len(shard.header).to_bytes(8, "little") + shard.header.encode("ascii"), 0, self._seek_lock)

    def join(self, shard: Shard) -> None:
        """Opens a shard that another process made. Raises OSError."""
        self._files[shard.file] = open_file(os.fspath(self._result / shard.file), os.O_RDWR)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Puts encoded elements of a step, from the element-th on, at their final place."""
        self.put(step.file, step.offset + element * itemsize, data)

    def put(self, file: str, place: int, data: memoryview | bytes) -> None:
        """Writes bytes from a place of a shard on."""
        with explained(self._partial):
            write_at(self._files[file], data, place, self._seek_lock)

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Reads back what was written."""
        place = step.offset + element * itemsize
        while data.nbytes:
            n = self._read_at(self._files[step.file], data, place)
            if n == 0:
                raise OutputError(f"{self._result / step.file} is shorter than it was made; delete {self._partial}.")
            data, place = data[n:], place + n

    def sync(self) -> None:
        """Returns when everything that this process wrote is on the disk. Raises OSError."""
        for fd in self._files.values():
            os.fsync(fd)

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        """Hands written bytes to the disk meanwhile, so that `sync` has little left to do."""
        done = threading.Event()

        def flush() -> None:
            while not done.wait(0.2):
                for fd in self._files.values():
                    with contextlib.suppress(OSError):  # reported by `sync`
                        _flush(fd)

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def write_at(fd: int, data: memoryview | bytes, offset: int, seeking: threading.Lock) -> None:
    """Writes all of `data` at a place of a file. Raises OSError.

    Args:
        seeking: held by whoever moves the file's position, on systems where writing needs that.
    """
    view = memoryview(data).cast("B")
    while view.nbytes:
        if hasattr(os, "pwrite"):
            n = os.pwrite(fd, view, offset)
        else:  # Windows
            with seeking:
                os.lseek(fd, offset, os.SEEK_SET)
                n = os.write(fd, view)
        view, offset = view[n:], offset + n


def _flush(fd: int) -> None:
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)
