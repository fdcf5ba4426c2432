"""Temporary directories, removed when a command ends. After a kill, the next command removes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

_LOCK = ".in-use"


@contextlib.contextmanager
def scratch(prefix: str, root: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new directory in `root`, by default the system's for temporary files; its name begins with `prefix`.

    Directories of this prefix whose process has ended are removed first.
    """
    place = Path(root or tempfile.gettempdir())
    remove_left(prefix, root)
    with _alone_in(place):
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        lock = filelock.FileLock(work / _LOCK)
        lock.acquire()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()


def remove_left(prefix: str, root: str | os.PathLike[str] | None = None) -> None:
    """Removes directories of this prefix whose process has ended; for a command that may need none itself."""
    place = Path(root or tempfile.gettempdir())
    with _alone_in(place):
        for left in place.glob(f"{prefix}*"):
            _remove_if_left(left)


def _remove_if_left(folder: Path) -> None:
    lock = filelock.FileLock(folder / _LOCK)
    with contextlib.suppress(filelock.Timeout, OSError):
        lock.acquire(timeout=0)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """Allows one process at a time, so that a new directory is not removed before its lock is taken."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    fd = os.open(place, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks on directories
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
