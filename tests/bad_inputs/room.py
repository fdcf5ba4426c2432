"""A case, the room it happens in, and the command line run on it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from conftest import encode, llama_config, llama_shapes, write_json, write_weights

Arguments = list[str]
Tensors = dict[str, tuple[np.ndarray, str]]  # name -> (values, safetensors' name of the dtype)
LINEAR = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters: {weight: 0.5}
"""
TASK = """\
merge_method: task_arithmetic
base_model: a
models:
  - model: b
    parameters: {weight: 0.5}
"""
KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One input: an entry of a YAML file, or what the function of its name makes and returns a command for."""

    name: str
    what: str
    code: int  # 0: an odd input that must work
    words: list[str]  # parts of the message
    recipe: str = LINEAR  # r.yaml, beside the models a and b
    command: str = "run r.yaml -o out --threads 2"
    on_stdout: bool = False  # the verdict of `merge verify` is its result, so it goes to stdout
    stops_early: bool = False  # nothing at all may have been written, not even unfinished work

    def set_up(self, room: Room) -> Arguments:
        """Makes the input in a room -> the arguments of `merge`."""
        if self.name in SET_UPS:
            return SET_UPS[self.name](room)
        room.pair_and_recipe(self.recipe)
        return shlex.split(self.command)


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    changed: tuple[str, ...]  # files that were there before and are gone or different
    made: tuple[str, ...]  # files that were not there before


SET_UPS: dict[str, Callable[[Room], Arguments]] = {}


def set_up(function: Callable[[Room], Arguments]) -> Callable[[Room], Arguments]:
    """Makes the decorated function the set-up of the case of its name."""
    assert function.__name__ not in SET_UPS, function.__name__
    SET_UPS[function.__name__] = function
    return function


def read_cases(file: Path) -> dict[str, Case]:
    text = file.read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    assert list(entries) == re.findall(r"^(\w+):$", text, re.MULTILINE), "a name twice"
    for name, entry in entries.items():
        assert (name in SET_UPS) != bool({"recipe", "command"} & set(entry)), f"{name}: a function, or a text"
    return {
        name: Case(name, **{"stops_early": entry["code"] == 2} | entry)  # a wrong recipe is found before anything else
        for name, entry in entries.items()
    }


class Room:
    """A folder, what is in it, and what has to be undone afterwards (`stack`)."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path, self.stack = path, stack
        self.watch = True  # False: the case changes its own inputs while the command runs

    def model(
        self,
        name: str,
        *,
        seed: int = 0,
        layers: int = 2,
        hidden: int = 8,
        dtype: str = "F32",
        tied: bool = False,
        shards: int = 1,
        like: int | None = None,
        edit: Callable[[Tensors], object] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """A small Llama of normal numbers.

        Args:
            like: seed of another model of which this is a fine-tune.
            edit: changes the tensors before they are written.
            config: keys to add to config.json.
        """
        tensors: Tensors = {}
        shapes = llama_shapes(layers, hidden, tied)
        start = None if like is None else _numbers(shapes, like)
        for key, values in _numbers(shapes, seed).items():
            values = values if start is None else start[key] + np.float32(0.1) * values
            tensors[key] = (encode(values, dtype), KINDS[dtype])
        if edit is not None:
            edit(tensors)
        path = self.path / name
        path.mkdir(parents=True)
        write_weights(path, tensors, shards)
        write_json(path / "config.json", llama_config(layers, hidden, tied, KINDS[dtype]) | dict(config or {}))
        write_json(path / "tokenizer.json", {"model": {}})
        return path

    def pair(self, **same: Any) -> tuple[Path, Path]:
        """a, and b, a fine-tune of it."""
        return self.model("a", seed=1, **same), self.model("b", seed=2, like=1, **same)

    def recipe(self, text: str = LINEAR, name: str = "r.yaml") -> Arguments:
        (self.path / name).write_text(text, encoding="utf-8")
        return ["run", name, "-o", "out", "--threads", "2"]

    def pair_and_recipe(self, text: str = LINEAR, **same: Any) -> Arguments:
        self.pair(**same)
        return self.recipe(text)

    def run_before(self, arguments: Arguments) -> None:
        """Carries out a command that has to work, before the case."""
        done = call(arguments)
        assert done[0] == 0, done

    def patch(self, target: str, value: Any) -> None:
        self.stack.enter_context(mock.patch(target, value))

    def during_the_run(self, action: Callable[[], object]) -> None:
        """Calls `action` after the plan is made and the output directory is open, before the tensors are read."""
        from merge.engine import run

        check = run.check_models

        def then(*arguments: Any) -> Any:
            action()
            return check(*arguments)

        self.watch = False
        self.patch("merge.engine.run.check_models", then)


def _numbers(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_parts(path: Path, header: Mapping[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    header, data = read_parts(path)
    edit(header)
    write_parts(path, header, data)


@contextlib.contextmanager
def opened(case: Case, path: Path) -> Iterator[tuple[Room, Arguments]]:
    """The room with everything in it, as the working directory, and the arguments."""
    with contextlib.ExitStack() as stack:
        room = Room(path, stack)
        stack.enter_context(contextlib.chdir(path))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}))
        yield room, case.set_up(room)


def try_out(case: Case, path: Path) -> Outcome:
    """Runs `merge` in this process, through its entry point, in an empty folder."""
    with opened(case, path) as (room, arguments):
        before = snapshot(path)
        code, stdout, stderr = call(arguments)
        after = snapshot(path)
    changed = [name for name, digest in before.items() if after.get(name) != digest] if room.watch else []
    return Outcome(code, stdout, stderr, tuple(changed), tuple(name for name in after if name not in before))


def snapshot(path: Path) -> dict[str, str]:
    """Digest of every file; a directory has none."""
    found = {}
    for place in sorted(path.rglob("*")):
        name = place.relative_to(path).as_posix()
        found[name] = hashlib.sha256(place.read_bytes()).hexdigest() if place.is_file() else ""
    return found


def call(arguments: Arguments) -> tuple[int, str, str]:
    from merge.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["merge", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()
