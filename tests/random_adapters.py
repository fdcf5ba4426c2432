"""Adapters of random numbers, recipes of them, and the changes that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.adapters.files import open_adapter
from merge.plan import Plan
from merge.recipe.model import ModelRef

F64 = npt.NDArray[np.float64]
SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.mlp.up_proj": (32, 16),
    "model.layers.1.self_attn.q_proj": (16, 16),
    "model.layers.1.mlp.up_proj": (32, 16),
}
EMBEDDING = "model.embed_tokens"
PREFIX = "base_model.model."


def write_adapter(
    path: Path,
    seed: int,
    rank: int = 4,
    alpha: float = 8,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    ranks: dict[str, int] | None = None,
    embedding: tuple[int, int] | None = None,
    saved: dict[str, npt.NDArray[Any]] | None = None,
    **config: Any,
) -> Path:
    """An adapter of random numbers as PEFT lays it out; `embedding`: (vocabulary, width) of an embedding's change."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.3)

    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, (rows, columns) in shapes.items():
        r = (ranks or {}).get(name, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = normal(r, columns)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = normal(rows, r)
        if config.get("use_dora"):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = np.abs(normal(rows)) + 1
    if embedding:
        tensors[f"{PREFIX}{EMBEDDING}.lora_embedding_A"] = normal(rank, embedding[0])
        tensors[f"{PREFIX}{EMBEDDING}.lora_embedding_B"] = normal(embedding[1], rank)
    tensors |= {PREFIX + name: values for name, values in (saved or {}).items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in (*shapes, *([EMBEDDING] if embedding else []))}),
        "rank_pattern": ranks or {},
    }
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    return path


def changes(path: Path) -> dict[str, F64]:
    """Module -> scaling · B A, read back as anybody else would read it."""
    adapter = open_adapter(ModelRef(str(path), str(path)))
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        name: module.scaling * tensors[module.b.name].astype(np.float64) @ tensors[module.a.name].astype(np.float64)
        for name, module in adapter.modules.items()
    }


def plan(method: str, models: list[Any], **more: Any) -> Plan:
    listed = [model if isinstance(model, dict) else {"model": str(model)} for model in models]
    return build_plan(parse_recipe(yaml.safe_dump({"merge_method": method, "models": listed, **more}), None))


def weighted(path: Path, weight: float, **more: float) -> dict[str, Any]:
    return {"model": str(path), "parameters": {"weight": weight, **more}}


def run(out: Path, method: str, models: list[Any], **more: Any) -> dict[str, F64]:
    run_plan(plan(method, models, **more), out)
    assert verify_output(out).problems == ()
    return changes(out)


def nearest(matrix: F64, rank: int) -> F64:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def assert_close(got: F64, wanted: F64, tolerance: float = 1e-6) -> None:
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of different rank and scaling, the second one rsLoRA and without one of the modules."""
    some = {name: shape for name, shape in SHAPES.items() if name != "model.layers.1.mlp.up_proj"}
    a = write_adapter(tmp_path / "a", 1, rank=4, alpha=8)
    return a, write_adapter(tmp_path / "b", 2, rank=3, alpha=5, shapes=some, use_rslora=True)


def total(paths: tuple[Path, Path], weights: tuple[float, float]) -> dict[str, F64]:
    first, second = changes(paths[0]), changes(paths[1])
    return {name: weights[0] * first[name] + weights[1] * second.get(name, np.zeros(1)) for name in first}
