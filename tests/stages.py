"""Pipelines of two stages, and models for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merge.jobs.pipelines.run import StageReport

HEAD = """
merge_method: {method}
base_model: {root}/base
models:
  - model: {root}/a
    parameters: {{weight: 0.7, density: [0.3, 0.8]}}
  - model: {root}/b
    parameters: {{weight: -0.4, density: 0.6}}
dtype: {dtype}
seed: 3
"""
LINEAR = """
merge_method: linear
models: [{{model: {root}/a, parameters: {{weight: 1}}}}, {{model: {root}/b, parameters: {{weight: 2}}}}]
dtype: {dtype}
"""
SLERP = """
merge_method: slerp
base_model: {root}/a
models: [{{model: {root}/b}}]
parameters: {{t: 0.3}}
dtype: {dtype}
"""
FIRST = {"linear": LINEAR, "slerp": SLERP} | dict.fromkeys(
    ("task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "model_stock", "nuslerp", "sce"), HEAD
)
LAST = """
merge_method: ties
base_model: {root}/base
models:
  - model: {first}
    parameters: {{weight: 0.5, density: 0.4}}
  - model: {root}/c
    parameters: {{weight: 0.5, density: 0.6}}
dtype: bfloat16
"""


@pytest.fixture
def family(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """base, a, b, c in bfloat16; at this width a matrix has several chunks."""
    make_model(tmp_path / "base", hidden=512, layers=1, dtype="BF16")
    for seed, name in enumerate("abc", 1):
        model = {"hidden": 512, "layers": 1, "dtype": "BF16", "base": tmp_path / "base", "delta": 0.002}
        make_model(tmp_path / name, seed=seed, shards=seed, **model)
    return tmp_path


def first_text(method: str, root: Path, dtype: str = "bfloat16") -> str:
    text = FIRST[method].format(root=root, method=method, dtype=dtype)
    if method in ("model_stock", "nuslerp", "sce", "task_arithmetic"):
        text = text.replace(", density: [0.3, 0.8]", "").replace(", density: 0.6", "")
    if method in ("model_stock", "sce"):
        text = text.replace("weight: 0.7", "").replace("weight: -0.4", "")
    return text.replace("-0.4", "0.4") if method == "nuslerp" else text


def two(method: str, root: Path, dtype: str = "bfloat16") -> str:
    return f"name: first{first_text(method, root, dtype)}---{LAST.format(root=root, first='first')}"


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def how(reports: tuple[StageReport, ...]) -> list[str]:
    return ["unchanged" if r.how != "streamed" and r.report is None else r.how for r in reports]


DIAMOND = """
name: root
merge_method: linear
models: [{{model: {root}/a}}, {{model: {root}/b}}]
parameters: {{weight: 1}}
---
name: left
merge_method: task_arithmetic
base_model: {root}/base
models: [{{model: root, parameters: {{weight: 0.8}}}}]
---
name: right
merge_method: linear
models: [{{model: root, parameters: {{weight: 1}}}}, {{model: {root}/c, parameters: {{weight: 3}}}}]
---
merge_method: slerp
base_model: left
models: [{{model: right}}]
parameters: {{t: 0.4}}
"""
