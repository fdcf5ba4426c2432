"""Recipes of mixtures of two small models, planned and made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.plan import Plan

TWO = """
base_model: {root}/a
gate_mode: {mode}
experts:
  - {{source_model: {root}/a, positive_prompts: [w1 w2 w3], negative_prompts: [w9]}}
  - {{source_model: {root}/b, positive_prompts: ["w4 w5", "w6"]}}
"""
GATE = "model.layers.{}.block_sparse_moe.gate.weight"
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


@pytest.fixture
def root(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    make_model(tmp_path / "a", seed=1)
    make_model(tmp_path / "b", seed=2, base=tmp_path / "a", delta=0.01)
    return tmp_path


def planned(root: Path, text: str, mode: str = "random") -> Plan:
    plan = build_plan(parse_recipe(text.format(root=root, mode=mode)))
    assert Plan.from_json(plan.to_json()) == plan
    return plan


def made(root: Path, text: str, mode: str = "random", out: str = "out", **options: Any) -> dict[str, np.ndarray]:
    run_plan(planned(root, text, mode), root / out, **options)
    assert not verify_output(root / out).problems
    return load_file(root / out / "model.safetensors")
