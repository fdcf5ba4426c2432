"""Other sinks and workers than a directory and threads give the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from merge import build_plan, parse_recipe, run_plan
from merge.errors import UsageError
from merge.output.sink import MemorySink
from merge.plan import Plan

T = TypeVar("T")
S = TypeVar("S")


class Inline:
    """A worker without threads."""

    def __init__(self, n_threads: int) -> None:
        self.done = 0

    def each(self, function: Callable[[T], None], items: Iterable[T], tick: Callable[[], None], alone: int = 0) -> None:
        for item in items:
            function(item)
            self.done += len(item)  # type: ignore[arg-type]  # runs of steps

    def fold(self, start: Callable[[], S], update: Callable[[S, T], None], items: Iterable[T]) -> list[S]:
        state = start()
        for item in items:
            update(state, item)
        return [state]


@pytest.fixture
def plan(tmp_path: Path, make_model: Callable[..., Path]) -> Plan:
    base = make_model(tmp_path / "base", hidden=32, dtype="BF16")
    for name, seed in (("a", 1), ("b", 2)):
        make_model(tmp_path / name, hidden=32, dtype="BF16", base=base, delta=0.01, seed=seed)
    models = "".join(f"- {{model: {tmp_path}/{name}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for name in "ab")
    return build_plan(parse_recipe(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}"))


def test_memory_holds_what_a_directory_would(plan: Plan, tmp_path: Path) -> None:
    sink = MemorySink(plan)
    report = run_plan(plan, sink, threads=2)
    run_plan(plan, tmp_path / "out")
    assert report.out == "memory"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = sink.tensors()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in stored.items())
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert sink.files == files


def test_tensors_in_memory_count_in_the_budget(plan: Plan) -> None:
    with pytest.raises(UsageError, match="is too little"):
        run_plan(plan, _Huge(plan), max_ram=1 << 30)


class _Huge(MemorySink):
    @property
    def held_bytes(self) -> int:
        return 1 << 30


def test_any_worker_gives_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    made: list[Inline] = []

    def workers(n_threads: int) -> Inline:
        made.append(Inline(n_threads))
        return made[-1]

    run_plan(plan, tmp_path / "inline", workers=workers)
    run_plan(plan, tmp_path / "threads", threads=2)
    assert made[0].done == len(plan.steps)
    for name in ("model.safetensors", "merge_manifest.json"):
        assert (tmp_path / "inline" / name).read_bytes() == (tmp_path / "threads" / name).read_bytes()
