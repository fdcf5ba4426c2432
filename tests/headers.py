"""Checkpoints of any size that are all header: sparse files whose numbers are zeros nobody stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def llama_shapes(
    *, layers: int, hidden: int, intermediate: int, vocabulary: int, heads: int, kv_heads: int
) -> dict[str, tuple[int, ...]]:
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    parts = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


LLAMA_70B = {"layers": 80, "hidden": 8192, "intermediate": 28672, "vocabulary": 32000, "heads": 64, "kv_heads": 8}
MISTRAL_7B = {"layers": 32, "hidden": 4096, "intermediate": 14336, "vocabulary": 32000, "heads": 32, "kv_heads": 8}


def write_llama(path: Path, sizes: Mapping[str, int], dtype: str = "BF16", shards: int = 15) -> Path:
    """A header-only Llama of these sizes."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "vocab_size": sizes["vocabulary"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return write_headers(path, llama_shapes(**sizes), config, dtype, shards)


def write_headers(
    path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], dtype: str = "F32", shards: int = 1
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    names = list(shapes)
    placed = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        _write_sparse(path / file, {name: shapes[name] for name in part}, dtype)
        placed |= dict.fromkeys(part, file)
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def _write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place)
