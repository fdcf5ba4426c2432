"""OUT.partial while training goes on, and OUT once it is whole.

OUT.partial holds run.json (what is trained on what: another run may not go on there), a lock, the checkpoints, and at
the end result/, which is renamed to OUT when everything is in it. A kill at any moment leaves no OUT, or a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.output.directory import LOCK, check_out, check_partial, explained, partial_of, swap, take_lock

Sources = Sequence[tuple[str, str]]  # (name, path) of what is read, which a result may never replace
RUN, RESULT = "run.json", "result"


class TrainingDirectory:
    """Context manager; on an exception OUT.partial stays for the next run. Of several processes only the first acts."""

    def __init__(
        self, out: Path, identity: dict[str, Any], force: bool, first: bool = True, sources: Sources = ()
    ) -> None:
        self.out, self.partial, self.identity, self.force, self.first = out, partial_of(out), identity, force, first
        self.sources = sources
        self.result = self.partial / RESULT

    def __enter__(self) -> TrainingDirectory:
        if self.first:
            check_out(self.out, self.force, self.sources)
            with explained(self.partial):
                self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.first:
            self._lock.release()

    def _open(self) -> None:
        check_partial(self.partial, RUN, "merge finetune")
        begun = (self.partial / RUN).exists()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.partial)
        try:
            self._claim(begun)
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
        check_out(self.out, self.force, self.sources)
        swap(self.result, self.out)
        self._lock.release()
        shutil.rmtree(self.partial)


def _differences(file: Path, identity: dict[str, Any]) -> list[str]:
    """What has another value in run.json, by name; keys of the config by their own."""
    try:
        before = parse_json(file.read_bytes())
        flat = {**before.pop("config"), **before}
    except (OSError, ValueError, KeyError, AttributeError):
        return ["an unreadable run.json"]
    now = json.loads(json.dumps(identity))
    now = {**now.pop("config"), **now}
    return sorted(name for name in {**flat, **now} if flat.get(name) != now.get(name))
