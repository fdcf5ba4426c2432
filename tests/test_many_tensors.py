"""Models of many tensors: mixtures of experts at their real shapes, and what is done for many tensors at once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge.engine.carry import by_threads
from merge.engine.context import Context
from merge.engine.memory import budget
from merge.engine.order import Item
from merge.engine.run import run_plan
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


SHAPES = {f"model.layers.{layer}.mlp.up_proj.weight": (512, 256) for layer in range(2)} | {"model.norm.weight": (256,)}


def many_models(path: Path, count: int, method: str) -> Path:
    """A recipe of that many fine-tunes of one base."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for number in range(count + 1):
        tensors = {name: torch.from_numpy(values + number / 1000).bfloat16() for name, values in base.items()}
        (path / f"m{number}").mkdir()
        save_file(tensors, str(path / f"m{number}" / "model.safetensors"))
        (path / f"m{number}" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    models = "\n".join(f"  - {{model: {path}/m{number}, parameters: {{weight: 1}}}}" for number in range(1, count + 1))
    recipe = path / "recipe.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: {path}/m0\ndtype: bfloat16\nmodels:\n{models}\n")
    return recipe


def test_sixty_models_take_the_memory_of_sixty_blocks_and_fewer_threads_where_that_is_little(tmp_path: Path) -> None:
    plan = build_plan(load_recipe(many_models(tmp_path, 60, "task_arithmetic")))
    alone = budget(plan, 1, None).peak
    assert budget(plan, 8, alone).threads == 1  # however many are asked for
    each = (budget(plan, 2, None).peak - alone) / (61 * 512 * 256 * 2)
    assert 1 <= each < 1.2  # a thread more is a block of every model more, and of the result


def test_plans_count_themselves(tmp_path: Path) -> None:
    plan = build_plan(load_recipe(many_models(tmp_path, 3, "task_arithmetic")))
    large = dataclasses.replace(plan, steps=plan.steps * 10_000)
    more = budget(large, 1, None).peak - budget(plan, 1, None).peak
    assert 3 * 10_000 * 4 * 500 < more < 3 * 10_000 * 4 * 2000  # bytes for a source


def test_the_thread_that_checks_models_keeps_no_blocks_of_them(tmp_path: Path) -> None:
    held: list[dict[str, object]] = []

    def carry(context: Context, todo: list[Item], tick: Callable[[], None]) -> None:
        held.append(dict(vars(context.buffers._scratch)))
        by_threads(context, todo, tick)

    run_plan(build_plan(load_recipe(many_models(tmp_path, 3, "task_arithmetic"))), tmp_path / "out", carry=carry)
    assert held == [{}]
