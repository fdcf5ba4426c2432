"""Checks that a source file has not changed; see SourceFile in merge/plan.py."""

from __future__ import annotations

import os

from merge.errors import CheckpointError, SourceChanged
from merge.plan import SourceFile

_RUN_AGAIN = "Wait until nothing writes to it, then run again."


def check_unchanged(file: SourceFile) -> None:
    """Raises SourceChanged if the file is gone or has changed, CheckpointError if that cannot be determined."""
    try:
        now = os.stat(file.path)
    except FileNotFoundError:
        raise gone(file.path) from None
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read ({error.strerror}).") from None
    compare(file, now)


def compare(file: SourceFile, now: os.stat_result) -> None:
    """Raises SourceChanged if the file's present state `now` differs from the recorded one."""
    if now.st_size != file.size:
        raise SourceChanged(
            f"{file.path}: changed since the run was planned: expected {file.size:,} bytes, found {now.st_size:,}. "
            + _RUN_AGAIN
        )
    if now.st_mtime_ns != file.mtime_ns:
        late = (now.st_mtime_ns - file.mtime_ns) / 1e9
        raise SourceChanged(f"{file.path}: was written again since the run was planned ({late:+.3f} s). {_RUN_AGAIN}")
    if SourceFile.of(file.path, now).stamp != file.stamp:
        raise SourceChanged(
            f"{file.path}: was replaced or written to since the run was planned; its size and mtime are the same, its "
            f"inode or ctime is not. {_RUN_AGAIN}"
        )


def gone(path: str) -> SourceChanged:
    return SourceChanged(f"{path}: was there when the run was planned and is gone. {_RUN_AGAIN}")
