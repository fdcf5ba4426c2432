"""Random Llama checkpoints of real shapes, to time merges with: a base and fine-tunes whose task vectors are small.

python benchmarks/models.py DIR --size 1b --experts 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {  # hidden, layers, intermediate, vocabulary, heads, KV heads
    "tiny": (64, 4, 176, 512, 4, 2),
    "small": (512, 8, 1408, 8192, 8, 4),
    "1b": (2048, 22, 5632, 32000, 32, 4),
    "3b": (2048, 66, 5632, 32000, 32, 4),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, layers, intermediate, vocabulary, heads, kv_heads = SIZES[size]
    kv = hidden // heads * kv_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {
            p + "self_attn.q_proj.weight": (hidden, hidden),
            p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden),
            p + "self_attn.o_proj.weight": (hidden, hidden),
            p + "mlp.gate_proj.weight": (intermediate, hidden),
            p + "mlp.up_proj.weight": (intermediate, hidden),
            p + "mlp.down_proj.weight": (hidden, intermediate),
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(size: str, dtype: str) -> dict[str, object]:
    hidden, layers, intermediate, vocabulary, heads, kv_heads = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def write(root: Path, size: str, experts: int, dtype: str = "bfloat16", seed: int = 0, delta: float = 1e-3) -> None:
    """root/base and root/expert-1 ..: one shard for every 2 GB, tensor by tensor so that memory stays small."""
    out = {name: root / name for name in ["base", *(f"expert-{i + 1}" for i in range(experts))]}
    shards: dict[str, list[dict[str, torch.Tensor]]] = {name: [{}] for name in out}
    count: dict[str, int] = dict.fromkeys(out, 0)
    weight_map: dict[str, dict[str, str]] = {name: {} for name in out}

    def flush(name: str) -> None:
        tensors = shards[name][0]
        if tensors:
            count[name] += 1
            file = f"part-{count[name]}.safetensors"
            save_file(tensors, out[name] / file, metadata={"format": "pt"})
            weight_map[name].update(dict.fromkeys(tensors, file))
            shards[name][0] = {}

    generator = torch.Generator().manual_seed(seed)
    for path in out.values():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config(size, dtype), indent=2))
    for tensor, shape in shapes(size).items():
        base = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "norm" in tensor else 0.0)
        for name in out:
            values = base if name == "base" else base + torch.randn(shape, generator=generator) * delta
            shards[name][0][tensor] = values.to(getattr(torch, dtype))
            if sum(t.nbytes for t in shards[name][0].values()) > 500e6:
                flush(name)
    for name, path in out.items():
        flush(name)
        for i in range(1, count[name] + 1):
            final = f"model-{i:05d}-of-{count[name]:05d}.safetensors"
            (path / f"part-{i}.safetensors").rename(path / final)
            weight_map[name] = {k: final if v == f"part-{i}.safetensors" else v for k, v in weight_map[name].items()}
        index = {"metadata": {}, "weight_map": weight_map[name]}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.root, arguments.size, arguments.experts, arguments.dtype, arguments.seed)
