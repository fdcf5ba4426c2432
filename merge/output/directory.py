"""Checks of OUT and OUT.partial, their lock, files that appear only when complete, and messages for disk errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import filelock

from merge.errors import OutputError, UsageError
from merge.jsontext import parse_json

LOCK = "run.lock"
Sources = Iterable[tuple[str, str | os.PathLike[str]]]  # (name, path) of inputs, which a result never replaces
Kind = Literal["directory", "file"]


def partial_of(out: Path) -> Path:
    """The path OUT.partial. Raises UsageError if OUT cannot be the name of a new directory."""
    if out.name in ("", ".."):  # "." and the like
        out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"--out {out}: expected the name of a directory to make.")
    return out.with_name(out.name + ".partial")


def finished_of(out: Path) -> Path:
    """OUT.finished"""
    return partial_of(out).with_suffix(".finished")


def placed(out: Path) -> dict[str, Any] | None:
    """The report in OUT.finished, if it belongs to this OUT: a call was killed after OUT got its name.

    Raises:
        UsageError: OUT.finished was not written by this package.
    """
    path = finished_of(out)
    try:
        note = parse_json(path.read_bytes())
        place, _, _ = note["file"], note["identity"], note["report"]
    except (IsADirectoryError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} exists and was not written by merge; nothing was changed. Move it away.") from None
    except OSError:  # not there, as a rule
        return None
    with contextlib.suppress(OSError):
        info = os.stat(out, follow_symlinks=False)
        if place == [info.st_dev, info.st_ino]:
            return dict(note)
    return None


def check_out(out: Path, force: bool, sources: Sources = (), kind: Kind = "directory") -> None:
    """Raises UsageError if `out` is there and may not be replaced; an empty directory may be, and what is `placed` is
    not in the way of the command that placed it."""
    if not os.path.lexists(out) or placed(out) is not None:
        return
    if out.is_symlink() or not (out.is_dir() if kind == "directory" else out.is_file()):
        raise UsageError(f"{out} exists and is not a {kind}; nothing was changed. Choose another --out.")
    if not force and (kind == "file" or any(out.iterdir())):
        raise UsageError(f"{out} exists; nothing was changed. Choose another --out, or --force to replace it.")
    for name, path in sources:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {name}, which this run reads; nothing was changed. Choose another --out.")


def check_partial(partial: Path, mark: str, verb: str) -> None:
    """Raises UsageError if OUT.partial exists and is not this verb's: it has files, but not `mark`."""
    found = {path.name for path in partial.iterdir()} - {LOCK, _new(partial / mark).name} if partial.is_dir() else set()
    if found and mark not in found:
        raise UsageError(
            f"{partial} exists and is not unfinished work of {verb}; nothing was changed. "
            "Move it away, or choose another --out."
        )


def take_lock(partial: Path, name: str = LOCK) -> filelock.BaseFileLock:
    """The directory's lock, held. Raises OutputError if another process has it."""
    lock = filelock.FileLock(partial / name)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(f"{partial} is being written by another run. Wait for it, or choose another --out.") from None
    return lock


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that nothing reads before it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears, or replaces another, only once it is completely on disk. Raises OSError."""
    new = _new(path)
    try:
        write_durably(new, data)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def _new(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f".{path.name}.new")


def sync(path: Path) -> None:
    """Has a file on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def explained(partial: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError with a clear message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(partial if partial.exists() else partial.parent).free
            raise OutputError(
                f"{partial}: the disk is full ({free:,} bytes free). Make room and run the same command "
                "again: it resumes where it stopped."
            ) from error
        hint = _HINTS.get(error.errno or 0, "Choose another --out.")
        raise OutputError(f"{partial}: cannot write: {error.strerror or error}. {hint}") from error


_HINTS = {
    errno.EFBIG: "Give a smaller --shard-size: this disk does not hold files of that size.",
    errno.EMFILE: "Give a larger --shard-size, or allow more open files (ulimit -n).",
}
