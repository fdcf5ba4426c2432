"""Hand-made families for merge analyse: a small Llama, and fine-tunes of it whose deltas are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import NAMES, TOKENIZER, encode, llama_config, llama_shapes, write_json, write_weights

from merge.recipe import parse_reference
from merge.tools.analyse import Analysis, analyse

Tensors = dict[str, np.ndarray]  # float32


def base_tensors(hidden: int = 16, layers: int = 2, seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        name: (name.endswith("norm.weight") + 0.05 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in llama_shapes(layers, hidden, False).items()
    }


def write_model(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "F32",
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = TOKENIZER,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> Path:
    hidden = tensors["model.norm.weight"].size
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    path.mkdir()
    write_weights(path, {name: (encode(values, dtype), NAMES[dtype]) for name, values in tensors.items()}, 1)
    write_json(path / "config.json", llama_config(layers, hidden, False, NAMES[dtype]) | dict(config or {}))
    if tokenizer is not None:
        write_json(path / "tokenizer.json", tokenizer)
        write_json(path / "tokenizer_config.json", {"unk_token": "<unk>"} | dict(tokenizer_config or {}))
    return path


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is read again"""
    coded = encode(values, dtype)
    return (coded.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else coded.astype(np.float32)


def moved(base: Tensors, delta: Callable[[str, tuple[int, ...]], np.ndarray | float]) -> Tensors:
    """base + delta(name, shape)"""
    return {name: (values + delta(name, values.shape)).astype(np.float32) for name, values in base.items()}


def noise(seed: int, scale: float = 0.001) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    random = np.random.default_rng(seed)
    return lambda name, shape: scale * random.standard_normal(shape)


def low_rank(seed: int, rank: int, parts: tuple[str, ...], size: float = 0.01) -> Callable[..., np.ndarray | float]:
    """Products of two normal matrices, of standard deviation `size`, where a name has one of `parts` in it"""
    random = np.random.default_rng(seed)

    def delta(name: str, shape: tuple[int, ...]) -> np.ndarray | float:
        if not any(part in name for part in parts):
            return 0.0
        left, right = random.standard_normal((shape[0], rank)), random.standard_normal((rank, shape[1]))
        return size / np.sqrt(rank) * left @ right

    return delta


def analysis_of(*paths: Path, **options: Any) -> Analysis:
    base, *models = [parse_reference(str(path)) for path in paths]
    return analyse(base, models, **options)
