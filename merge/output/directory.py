"""What every command that makes a directory keeps to: OUT.partial, one writer at a time, and a name only for the whole.

Nothing existing is touched before it may be, and nothing half-written is ever where a result belongs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from merge.errors import OutputError, UsageError

LOCK = "run.lock"


def partial_of(out: Path) -> Path:
    """OUT.partial. Raises UsageError for what cannot be the name of a directory to make."""
    if out.name in ("", ".."):  # "." and the like
        out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"--out {out}: expected the name of a directory to make.")
    return out.with_name(out.name + ".partial")


def check_out(out: Path, force: bool, sources: Iterable[tuple[str, str | os.PathLike[str]]] = ()) -> None:
    """Raises UsageError if `out` is there and may not be replaced.

    Args:
        sources: (name, path) of what is read meanwhile: never replaced, whatever `force` says.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} exists and is not a directory; nothing was changed. Choose another --out.")
    if not force and any(out.iterdir()):
        raise UsageError(f"{out} exists; nothing was changed. Choose another --out, or --force to replace it.")
    for name, path in sources:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {name}, which this run reads; nothing was changed. Choose another --out.")


def check_partial(partial: Path, mark: str, verb: str) -> None:
    """Raises UsageError if OUT.partial is there and is not this verb's: it holds files, and `mark` is none of them."""
    found = {path.name for path in partial.iterdir()} - {LOCK} if partial.is_dir() else set()
    if found and mark not in found:
        raise UsageError(
            f"{partial} exists and is not unfinished work of {verb}; nothing was changed. "
            "Move it away, or choose another --out."
        )


def take_lock(partial: Path) -> filelock.BaseFileLock:
    """The directory's lock, held. Raises OutputError if another process has it."""
    lock = filelock.FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(f"{partial} is being written by another run. Wait for it, or choose another --out.") from None
    return lock


def write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def swap(new: Path, out: Path) -> None:
    """Gives the directory `new` the name `out`; what had it is removed only then."""
    if not out.exists():
        os.rename(new, out)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old)


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
    """Turns an OSError into one clear sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(partial if partial.exists() else partial.parent).free
            raise OutputError(
                f"{partial}: the disk is full ({free:,} bytes free). Make room and run the same command again: "
                "it goes on where it was."
            ) from error
        hint = _HINTS.get(error.errno or 0, "Choose another --out.")
        raise OutputError(f"{partial}: cannot write: {error.strerror or error}. {hint}") from error


_HINTS = {
    errno.EFBIG: "Give a smaller --shard-size: this disk does not hold files of that size.",
    errno.EMFILE: "Give a larger --shard-size, or allow more open files (ulimit -n).",
}
