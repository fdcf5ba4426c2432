"""OUT.partial while training goes on, and OUT once it is whole.

OUT.partial holds run.json (what is trained on what: another run may not go on there), a lock, the checkpoints, and at
the end result/, which is renamed to OUT when everything is in it. A kill at any moment leaves no OUT, or a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock

from merge.errors import OutputError, UsageError
from merge.output.writer import partial_of

RUN, LOCK, RESULT = "run.json", "run.lock", "result"


class TrainingDirectory:
    """Context manager; on an exception OUT.partial stays for the next run. Of several processes only the first acts."""

    def __init__(self, out: Path, identity: dict[str, Any], force: bool, first: bool = True) -> None:
        self.out, self.partial, self.identity, self.force, self.first = out, partial_of(out), identity, force, first
        self.result = self.partial / RESULT

    def __enter__(self) -> TrainingDirectory:
        if self.first:
            check_out(self.out, self.force)
            try:
                self._open()
            except OSError as error:
                raise OutputError(
                    f"{self.partial}: cannot write: {error.strerror or error}. Choose another out."
                ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self.first:
            self._lock.release()

    def _open(self) -> None:
        found = {path.name for path in self.partial.iterdir()} - {LOCK} if self.partial.is_dir() else set()
        if found and RUN not in found:
            raise UsageError(
                f"{self.partial} exists and is not unfinished work of merge finetune; nothing was changed. "
                "Move it away, or choose another out."
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.partial / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise OutputError(
                f"{self.partial} is being written by another run. Wait for it, or choose another out."
            ) from None
        try:
            self._claim(bool(found))
        except BaseException:
            self._lock.release()
            raise

    def _claim(self, begun: bool) -> None:
        file = self.partial / RUN
        if begun and (different := _differences(file, self.identity)):
            if not self.force:
                raise UsageError(
                    f"{self.partial} holds unfinished training that differs in: {', '.join(different)}. Run that one "
                    "to finish it, delete the directory, or use --force to start anew."
                )
            begun = False
        if not begun:
            for path in self.partial.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            file.write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
        if self.result.exists():  # a kill while it was written
            shutil.rmtree(self.result)

    def complete(self) -> None:
        """Gives the result its name and removes the rest."""
        for path in self.result.rglob("*"):
            if path.is_file():
                with path.open("rb+") as stream:
                    os.fsync(stream.fileno())
        check_out(self.out, self.force)
        if self.out.exists():
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
            os.rename(self.out, old)
            os.rename(self.result, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.result, self.out)
        self._lock.release()
        shutil.rmtree(self.partial)


def check_out(out: Path, force: bool) -> None:
    """Raises UsageError if `out` is there and may not be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} exists and is not a directory; nothing was changed. Choose another out.")
    if not force and any(out.iterdir()):
        raise UsageError(f"{out} exists; nothing was changed. Choose another out, or --force to replace it.")


def _differences(file: Path, identity: dict[str, Any]) -> list[str]:
    """What has another value in run.json, by name; keys of the config by their own."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        flat = {**before.pop("config"), **before}
    except (OSError, ValueError, KeyError, AttributeError):
        return ["an unreadable run.json"]
    now = json.loads(json.dumps(identity))
    now = {**now.pop("config"), **now}
    return sorted(name for name in {**flat, **now} if flat.get(name) != now.get(name))
