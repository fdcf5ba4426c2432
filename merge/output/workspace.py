"""OUT.partial, where a verb works, and the one way in which what it made becomes OUT.

    OUT.partial/run.lock    one writer at a time
    OUT.partial/MARK        says whose work this is: journal.jsonl, run.json
    OUT.partial/result      what becomes OUT, a directory or a file
    OUT.partial/replaced    the old OUT, for a moment, where the system cannot exchange two names in one step
    OUT.finished            from just before OUT gets its name until everything above is removed

Whenever a run is killed, OUT is what it was before or the whole result, and the same command ends well: it resumes, or
finds OUT.finished, removes what is left and repeats the report.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from merge.errors import StaleWork, kept_by
from merge.output.directory import (
    LOCK,
    Kind,
    Sources,
    check_out,
    check_partial,
    explained,
    finished_of,
    partial_of,
    placed,
    sync_directory,
    take_lock,
    write_whole,
)

RESULT, _REPLACED = "result", "replaced"
R = TypeVar("R")


class Workspace:
    """Context manager. On an exception OUT.partial stays for the next call.

    Attributes:
        finished: the report of a call like this one that was killed after OUT had got its name; None otherwise.
    """

    def __init__(
        self,
        out: Path,
        mark: str,
        verb: str,
        identity: Mapping[str, object],
        *,
        force: bool = False,
        sources: Sources = (),
        kind: Kind = "directory",
        last: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            mark: the file in OUT.partial that says whose work it is.
            verb: that makes OUT, for messages.
            identity: everything OUT follows from, for JSON.
            force: replace an OUT that is there.
            sources: (name, path) of what is read, which is never replaced.
            last: removes what else was made for OUT, once that has its name.
        """
        self.out, self.mark, self.verb, self.force, self.sources, self.kind = out, mark, verb, force, sources, kind
        self.partial = partial_of(out)
        self.result = self.partial / RESULT
        self.finished: dict[str, Any] | None = None
        self.identity, self._last = json.loads(json.dumps(identity)), last

    def __enter__(self) -> Workspace:
        with explained(self.partial):
            self.check()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.partial)
            try:
                self._settle()
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                if {path.name for path in self.partial.iterdir()} == {LOCK}:
                    self._remove_partial()
        self._lock.release()
        if error is not None:
            kept_by(error, self.partial)

    def check(self) -> None:
        """Raises UsageError if OUT may not be replaced, or OUT.partial belongs to something else."""
        if placed(self.out) is None:
            check_partial(self.partial, self.mark, self.verb)
            check_out(self.out, self.force, self.sources, self.kind)

    def _settle(self) -> None:
        """Completes a placement that a kill interrupted."""
        if not os.path.lexists(self.out) and (self.partial / _REPLACED).exists():
            os.rename(self.partial / _REPLACED, self.out)
        note = placed(self.out)
        if note is not None:
            self._clean_up()
            if note["identity"] == self.identity:
                self.finished = note["report"]
                return
        finished_of(self.out).unlink(missing_ok=True)
        check_out(self.out, self.force, self.sources, self.kind)  # the run that had the lock may have made it
        if note is not None:
            self.partial.mkdir(exist_ok=True)
            self._lock = take_lock(self.partial)

    def complete(self, report: Mapping[str, object]) -> None:
        """Gives the result, which is completely on disk, the name OUT, and removes the rest.

        Args:
            report: `finished` of the next call, if this one is killed from now on; for JSON.
        """
        with explained(self.partial):
            check_out(self.out, self.force, self.sources, self.kind)
            info = os.stat(self.result)
            note = {"file": [info.st_dev, info.st_ino], "identity": self.identity, "report": report}
            write_whole(finished_of(self.out), json.dumps(note).encode())
            sync_directory(self.partial)
            self._place()
            sync_directory(self.out.absolute().parent)
            self._clean_up()

    def _place(self) -> None:
        if not os.path.lexists(self.out):
            os.rename(self.result, self.out)
        elif self.kind == "file":
            os.replace(self.result, self.out)
        elif not exchange(self.result, self.out):
            os.rename(self.out, self.partial / _REPLACED)
            os.rename(self.result, self.out)

    def stale(self, what: str) -> StaleWork:
        """The error for unfinished work that does not fit the present source files."""
        return StaleWork(
            f"{self.partial} holds unfinished work with other contents of {what}, which changed since. Put the old "
            "file back to finish that work, or use --force to start over."
        )

    def clear(self) -> None:
        """Removes unfinished work."""
        # The mark is removed last, because it identifies the rest.
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == self.mark):
            if path.name != LOCK:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _clean_up(self) -> None:
        self.clear()
        self._remove_partial()
        self._last()
        finished_of(self.out).unlink(missing_ok=True)

    def _remove_partial(self) -> None:
        """Of OUT.partial only the lock is left."""
        self._lock.release()
        (self.partial / LOCK).unlink(missing_ok=True)
        self.partial.rmdir()


def settle(out: Path) -> None:
    """Removes what a kill left beside an OUT that had got its name, for those who find it and do not make it again."""
    if placed(out) is not None:
        with explained(partial_of(out)):
            if partial_of(out).is_dir():
                shutil.rmtree(partial_of(out))
            finished_of(out).unlink()


def resume(work: Callable[[bool], R], force: bool) -> R:
    """What work(fresh=False) returns; with `force`, where unfinished work is stale, what work(fresh=True) does."""
    try:
        return work(False)
    except StaleWork:
        if not force:
            raise
    return work(True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, so that at every moment something has each; False where that cannot be done.

    Source: renameat2(2), RENAME_EXCHANGE; Linux 3.15, and not every file system.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(flag)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))
