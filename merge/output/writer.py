"""The output directory while it is being made: OUT.partial, its lock, its journal, and the rename that completes it.

A run writes every tensor at its final offset and then one line to the journal. Killed and started again, it takes the
tensors whose bytes still match their journal line and computes the rest. The manifest is written last, and then the
directory gets its name, so a directory of that name is always whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from merge.checkpoint.reader import best_read, open_file
from merge.errors import OutputError, UsageError
from merge.jsontext import parse_json
from merge.output.directory import (
    LOCK,
    check_out,
    check_partial,
    explained,
    partial_of,
    swap,
    sync_directory,
    take_lock,
    write_durably,
)
from merge.plan import Plan, Step

JOURNAL = "journal.jsonl"


def plan_digest(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json().encode("utf-8", "surrogateescape")).hexdigest()


class OutputDirectory:
    """Context manager. On a clean exit without `complete`, or on an exception, OUT.partial stays for the next run."""

    def __init__(self, plan: Plan, out: Path, force: bool = False, device: str = "cpu") -> None:
        self.plan, self.out, self.force, self.device = plan, out, force, device
        self.partial = partial_of(out)
        self.records: dict[int, dict[str, Any]] = {}  # of tensors that a journal says are done, by step
        self.notes: dict[str, Any] = {}  # other results worth keeping over a kill, such as a model's statistics
        self._files: dict[str, int] = {}
        self._journal_lock = threading.Lock()

    def __enter__(self) -> OutputDirectory:
        with explained(self.partial):
            self.check_out()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.partial)
            try:
                self.check_out()  # again: the run that had the lock may have made it
                self._open()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._lock.release()

    def check_out(self) -> None:
        """Raises UsageError if `out` is there and may not be replaced, or OUT.partial is somebody else's."""
        check_partial(self.partial, JOURNAL, "merge run")
        models = [model for plan in (self.plan, *self.plan.stages) for model in plan.models]
        places = [(model.ref, model.path) for model in models]
        places += [(model.ref, file.path) for model in models for file in model.files]  # adapters lie apart
        check_out(self.out, self.force, places)

    def _open(self) -> None:
        journal = self.partial / JOURNAL
        # A GPU rounds sums in another order: what it began, the processor must not finish, nor the other way round.
        first = {"plan": plan_digest(self.plan), "device": self.device}
        lines, whole = _journal_lines(journal)
        if lines and lines[0] != first:
            if not self.force:
                raise UsageError(
                    f"{self.partial} holds unfinished work of another recipe, other options or changed sources. "
                    "Run that one to finish it, delete the directory, or use --force to start anew."
                )
            lines = []
        if not lines:
            self._clear()
        self._files[JOURNAL] = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.truncate(journal, whole if lines else 0)
        if not lines:
            self._append(first)
        for line in lines[1:]:
            if "step" in line:
                self.records[line["step"]] = line
            else:
                self.notes.update(line)
        for shard in self.plan.shards:
            self._files[shard.file] = self._open_shard(shard.file, shard.header, shard.size)

    def _clear(self) -> None:
        """Removes unfinished work that is of no use."""
        found = [path for path in self.partial.iterdir() if path.name != LOCK]
        for path in sorted(found, key=lambda path: path.name == JOURNAL):  # the journal last: it says whose it is
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _open_shard(self, name: str, header: str, size: int) -> int:
        path = self.partial / name
        path.parent.mkdir(exist_ok=True)  # of a module in a folder of its own
        fd = open_file(os.fspath(path), os.O_RDWR | os.O_CREAT)
        os.truncate(fd, size)  # not fallocate: it makes the later writes several times dearer
        _write_all(fd, len(header).to_bytes(8, "little") + header.encode("ascii"), 0)
        return fd

    def _append(self, line: dict[str, Any]) -> None:
        with self._journal_lock:
            os.write(self._files[JOURNAL], json.dumps([_seal(line), line], separators=(",", ":")).encode() + b"\n")

    # While running; called from any thread.

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Puts encoded elements of a step at their final place."""
        with explained(self.partial):
            _write_all(self._files[step.file], data, step.offset + element * itemsize)

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Reads back what was written, to check it after a resume."""
        place = step.offset + element * itemsize
        while data.nbytes:
            n = _read_at(self._files[step.file], data, place)
            if n == 0:
                raise OutputError(f"{self.partial / step.file} is shorter than it was made; delete {self.partial}.")
            data, place = data[n:], place + n

    def finish(self, index: int, record: dict[str, Any]) -> None:
        """Journals that a step's tensor is whole."""
        line = {"step": index, **record}
        self.records[index] = line
        with explained(self.partial):
            self._append(line)

    def keep(self, name: str, value: Any) -> None:
        """Journals a result that is not a tensor."""
        self.notes[name] = value
        with explained(self.partial):
            self._append({name: value})

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        """Hands written bytes to the disk while the run goes on, so that the closing fsync has little left to do."""
        done = threading.Event()

        def flush() -> None:
            while not done.wait(0.2):
                for shard in self.plan.shards:
                    with contextlib.suppress(OSError):  # reported by the closing fsync
                        _flush(self._files[shard.file])

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def complete(self, small_files: dict[str, bytes], manifest: tuple[str, bytes]) -> None:
        """Writes the small files and, last, the manifest; makes all of it durable; gives the directory its name."""
        with explained(self.partial):
            for shard in self.plan.shards:
                os.fsync(self._files[shard.file])
            for name, data in (*small_files.items(), manifest):
                write_durably(self.partial / name, data)
            os.close(self._files.pop(JOURNAL))
            for folder in {(self.partial / name).parent for name in (*self._files, *small_files)} | {self.partial}:
                sync_directory(folder)
            self.check_out()
            swap(self.partial, self.out)
            # After the renaming: killed before it, all tensors are known to be done; and the lock holds until then.
            (self.out / JOURNAL).unlink()
            (self.out / LOCK).unlink(missing_ok=True)
            sync_directory(self.out.parent)


def _seal(line: dict[str, Any]) -> str:
    """A digest that tells a whole journal line from one that was cut short or damaged."""
    return xxhash.xxh3_64_hexdigest(json.dumps(line, separators=(",", ":")).encode())


def _journal_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal and their length in bytes; a line that a kill cut short ends it."""
    lines: list[dict[str, Any]] = []
    whole = 0
    data = path.read_bytes() if path.exists() else b""
    for text in data.split(b"\n")[:-1]:
        try:
            seal, line = parse_json(text)
        except (ValueError, TypeError):
            break
        if not isinstance(line, dict) or seal != _seal(line):
            break
        lines.append(line)
        whole += len(text) + 1
    return lines, whole


def _write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        if hasattr(os, "pwrite"):
            n = os.pwrite(fd, view, offset)
        else:  # Windows
            with _SEEK_LOCK:
                os.lseek(fd, offset, os.SEEK_SET)
                n = os.write(fd, view)
        view, offset = view[n:], offset + n


_SEEK_LOCK = threading.Lock()
_read_at = best_read(_SEEK_LOCK)


def _flush(fd: int) -> None:
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)
