"""Removes a directory with anything that a program left in it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil

_SOME = 1000  # entries at once: a directory may hold millions
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


def remove_tree(directory: str) -> None:
    """Raises nothing. What cannot be removed stays.

    Goes down and up again with one directory open at a time, so that depth costs neither stack nor open files nor long
    paths. Links are removed and not followed; directories that may not be read are made readable.
    """
    if os.open not in os.supports_dir_fd:  # Windows
        with contextlib.suppress(RecursionError):
            shutil.rmtree(directory, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.chmod(directory, 0o700)
        _empty(os.open(directory, _DIRECTORY))
        os.rmdir(directory)


def _empty(place: int) -> None:
    """Removes the contents of an open directory, and closes it."""
    above: list[tuple[str, _Level]] = []  # the name that was entered, and in which directory
    level = _Level(place)
    try:
        while True:
            if (name := level.next_directory(place)) is not None:
                try:
                    os.chmod(name, 0o700, dir_fd=place)
                    inner = os.open(name, _DIRECTORY, dir_fd=place)
                except OSError:
                    continue
                above.append((name, level))
                level = _Level(inner)
            elif above:
                name, level = above.pop()
                inner = os.open("..", _DIRECTORY, dir_fd=place)
                if _identity(inner) != level.identity:  # was moved meanwhile: what is above is not ours
                    os.close(inner)
                    return
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=inner)
                    level.entered.discard(name)
            else:
                return
            os.close(place)
            place = inner
    finally:
        os.close(place)


class _Level:
    """One directory on the way down: which it is, and the directories in it that are to be entered."""

    def __init__(self, place: int) -> None:
        self.identity = _identity(place)
        self._waiting: list[str] = []
        self.entered: set[str] = set()  # and are still there

    def next_directory(self, place: int) -> str | None:
        """Removes files until it comes to a directory that was not entered yet."""
        while not self._waiting:
            gone = 0
            with os.scandir(place) as entries:
                some = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in itertools.islice(entries, _SOME)]
            for name, is_directory in some:
                if not is_directory:
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=place)
                        gone += 1
                elif name not in self.entered:
                    self._waiting.append(name)
            if not gone and not self._waiting:
                return None
        name = self._waiting.pop()
        self.entered.add(name)
        return name


def _identity(place: int) -> tuple[int, int]:
    status = os.fstat(place)
    return status.st_dev, status.st_ino
