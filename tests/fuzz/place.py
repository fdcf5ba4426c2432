"""The folder that cases happen in, one after another, and what a format is."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bad_inputs.room import Arguments, Room

MADE = ("out", "out.partial", "out.stages", "merged")
LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


class Place(Room):
    """A room whose files get back what they held when they were kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, contextlib.ExitStack())
        self._sound: dict[Path, bytes] = {}
        self._touched: dict[Path, None] = {}

    def keep(self) -> None:
        """What there is now is sound."""
        self._sound = {path: path.read_bytes() for path in sorted(self.path.rglob("*")) if path.is_file()}

    def sound(self, name: str) -> bytes:
        return self._sound[self.path / name]

    def put(self, name: str, data: bytes | str) -> None:
        """Writes a file of the case."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
        self._touched[path] = None

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        self._touched[self.path / name] = None

    def reset(self) -> None:
        for path in self._touched:
            if path in self._sound:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._sound[path])
            else:
                path.unlink(missing_ok=True)
        self._touched.clear()
        for name in MADE:
            shutil.rmtree(self.path / name, ignore_errors=True)


class Format(Protocol):
    """One kind of file."""

    def set_up(self, place: Place) -> Arguments | Callable[[], object]:
        """Makes sound files, and returns a command (or a call) that works on them."""

    def damage(self, place: Place, dice: random.Random) -> Arguments | Callable[[], object]:
        """Damages files with `place.put`, and returns a command, or a call that may raise a MergeError."""


def a_run(dice: random.Random) -> Arguments:
    """A verb that reads two models and a recipe: mostly the plan, which takes a quarter of the time of a run."""
    run = ["run", "r.yaml", "-o", "out", "--threads", "2", "--quiet"]
    return dice.choice((run, run, ["plan", "r.yaml"], ["plan", "r.yaml", "--tensors"], ["plan", "r.yaml", "--json"]))
