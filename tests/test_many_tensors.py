"""Models of many tensors: mixtures of experts at their real shapes, and what is done for many tensors at once."""

from __future__ import annotations

import hashlib
import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from merge.jobs.build import build_plan
from merge.output import identity
from merge.output.held import HeldWrites
from merge.plan import Plan
from merge.planning.load import load_recipe

GIANTS = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "giants.py"))
SMALLER: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"num_hidden_layers": 4, "n_routed_experts": 16},
    "kimi-k2": {"num_hidden_layers": 2, "n_routed_experts": 12},
    "qwen3-235b": {"num_hidden_layers": 3, "num_experts": 8},
}


def planned(path: Path, name: str) -> tuple[Plan, list[tuple[str, str, tuple[int, ...]]]]:
    """(plan, tensors of each model) of a few layers with all their widths."""
    config = GIANTS["CONFIGS"][name] | SMALLER[name]
    return build_plan(load_recipe(GIANTS["family"](path, config))), list(GIANTS["entries"](config))


@pytest.mark.parametrize("name", SMALLER)
def test_a_mixture_of_experts_is_planned_from_headers_at_its_real_widths(tmp_path: Path, name: str) -> None:
    plan, entries = planned(tmp_path, name)
    layers = SMALLER[name]["num_hidden_layers"]
    beyond = f"model.layers.{layers}."  # multi-token prediction
    expected = {name: shape for name, _, shape in entries if "_scale_inv" not in name}
    assert {step.name: step.shape for step in plan.steps} == expected
    for step in plan.steps:
        kept = step.name.endswith("e_score_correction_bias")
        assert step.dtype == ("F32" if kept else "BF16"), step.name
        assert (step.method, len(step.inputs), step.base is None) == ("ties", 2, False)
    in_layer = Counter(step.name.split(".")[2] for step in plan.steps if step.name.startswith("model.layers."))
    assert len(in_layer) == layers + any(name.startswith(beyond) for name in expected)
    assert plan.n_parameters == sum(map(math.prod, expected.values()))


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-235b"])
def test_the_digest_of_a_plan_is_that_of_its_json(tmp_path: Path, name: str) -> None:
    plan, _ = planned(tmp_path, name)
    names = {file.path: f"file {number}" for number, file in enumerate(identity.source_files(plan))}
    text = identity._text(identity._plain(plan, names))
    assert identity.plan_digest(plan) == hashlib.sha256(text).hexdigest()


def test_neighbours_are_written_together() -> None:
    held = HeldWrites()
    for file, place, data in (("a", 4, b"ef"), ("b", 6, b"y"), ("a", 0, b"abcd"), ("a", 7, b"h"), ("b", 5, b"x")):
        held.hold(file, place, memoryview(data))
    assert list(held.writes()) == [("a", 0, b"abcdef"), ("a", 7, b"h"), ("b", 5, b"xy")]
    assert list(HeldWrites().writes()) == []
