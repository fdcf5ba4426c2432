"""Plans of the largest mixtures of experts at their real size: DeepSeek-V3, Kimi-K2, Qwen3-235B, of headers alone.

    python benchmarks/giants.py DIR [--model qwen3-235b]

Writes a base and two fine-tunes of each into DIR, if they are not there, in sparse files that hold no numbers and take
a few MB, with true names, shapes, dtypes and shards. Plans their ties and says how long it took and how much memory.
Names and sizes are those of the models' config.json and index on the Hub.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
SHARD_BYTES = 4_300_000_000
FP8_BLOCK = 128
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "vocab_size": 129280,
    },
    "kimi-k2": {
        **_DEEPSEEK,
        "model_type": "kimi_k2",
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": 163840,
    },
    "qwen3-235b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}


def entries(config: dict[str, Any]) -> Iterator[Entry]:
    """Every tensor of a model, in the order of its layers."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    layers = config["num_hidden_layers"]
    layer = _qwen3_layer if "num_experts" in config else _deepseek_layer
    for number in range(layers):
        yield from layer(config, number)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)
    for number in range(layers, layers + config.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{number}."
        yield from _deepseek_layer(config, number)
        yield f"{at}embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
        yield f"{at}shared_head.head.weight", "BF16", (config["vocab_size"], hidden)
        yield from ((f"{at}{part}.weight", "BF16", (hidden,)) for part in ("enorm", "hnorm", "shared_head.norm"))
        yield f"{at}eh_proj.weight", "BF16", (hidden, 2 * hidden)


def _deepseek_layer(config: dict[str, Any], number: int) -> Iterator[Entry]:
    at, hidden, heads = f"model.layers.{number}.", config["hidden_size"], config["num_attention_heads"]
    query, key, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield from _fp8(f"{at}self_attn.q_a_proj", (query, hidden))
    yield f"{at}self_attn.q_a_layernorm.weight", "BF16", (query,)
    yield from _fp8(f"{at}self_attn.q_b_proj", (heads * (nope + rope), query))
    yield from _fp8(f"{at}self_attn.kv_a_proj_with_mqa", (key + rope, hidden))
    yield f"{at}self_attn.kv_a_layernorm.weight", "BF16", (key,)
    yield from _fp8(f"{at}self_attn.kv_b_proj", (heads * (nope + value), key))
    yield from _fp8(f"{at}self_attn.o_proj", (hidden, heads * value))
    if number < config["first_k_dense_replace"]:
        yield from _mlp(f"{at}mlp.", config["intermediate_size"], hidden, fp8=True)
    else:
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        yield f"{at}mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{at}mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from _mlp(f"{at}mlp.shared_experts.", width * config["n_shared_experts"], hidden, fp8=True)
        for expert in range(experts):
            yield from _mlp(f"{at}mlp.experts.{expert}.", width, hidden, fp8=True)
    yield f"{at}input_layernorm.weight", "BF16", (hidden,)
    yield f"{at}post_attention_layernorm.weight", "BF16", (hidden,)


def _qwen3_layer(config: dict[str, Any], number: int) -> Iterator[Entry]:
    at, hidden, size = f"model.layers.{number}.", config["hidden_size"], config["head_dim"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{at}self_attn.{part}.weight", "BF16", (rows, hidden)
    yield f"{at}self_attn.o_proj.weight", "BF16", (hidden, queries)
    yield from ((f"{at}self_attn.{part}.weight", "BF16", (size,)) for part in ("q_norm", "k_norm"))
    yield f"{at}mlp.gate.weight", "BF16", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _mlp(f"{at}mlp.experts.{expert}.", config["moe_intermediate_size"], hidden, fp8=False)
    yield f"{at}input_layernorm.weight", "BF16", (hidden,)
    yield f"{at}post_attention_layernorm.weight", "BF16", (hidden,)


def _mlp(at: str, width: int, hidden: int, fp8: bool) -> Iterator[Entry]:
    for part, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        yield from _fp8(f"{at}{part}", shape) if fp8 else ((f"{at}{part}.weight", "BF16", shape),)


def _fp8(name: str, shape: tuple[int, int]) -> Iterator[Entry]:
    """A matrix and the inverse scales of its blocks."""
    yield f"{name}.weight", "F8_E4M3", shape
    rows, columns = shape
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))


def write(directory: Path, config: dict[str, Any]) -> None:
    """Shards of headers and holes, their index, and config.json."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shards = list(_shards(entries(config)))
    weight_map: dict[str, str] = {}
    for number, (shard, size) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        text = json.dumps(shard, separators=(",", ":")).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + size)
        weight_map |= dict.fromkeys((name for name in shard if name != "__metadata__"), file)
    index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: Iterator[Entry]) -> Iterator[tuple[dict[str, Any], int]]:
    """(header, bytes of data) of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype] * math.prod(shape)
        if at and at + size > SHARD_BYTES:
            yield header, at
            header, at = {"__metadata__": {"format": "pt"}}, 0
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    yield header, at


def family(root: Path, config: dict[str, Any]) -> Path:
    """The recipe of a base and two fine-tunes, which are there then."""
    for member in ("base", "a", "b"):
        if not (root / member).is_dir():
            write(root / member, config)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {root}/base\ndtype: bfloat16\n"
        f"models: [{{model: {root}/a}}, {{model: {root}/b}}]\nparameters: {{density: 0.5, weight: 0.5}}\n"
    )
    return recipe


def main() -> None:
    from many_tensors import measured

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=CONFIGS, help="only this one")
    arguments = parser.parse_args()
    for name in [arguments.model] if arguments.model else CONFIGS:
        recipe = family(arguments.directory.resolve() / name, CONFIGS[name])
        sizes = [math.prod(shape) for _, _, shape in entries(CONFIGS[name])]
        seconds, cpu, peak = measured([sys.executable, "-m", "merge", "plan", str(recipe)])
        print(
            f"{name}: {len(sizes):,} tensors, {sum(sizes) / 1e9:.0f}B numbers a model; plan {seconds:.1f} s, "
            f"processor {cpu:.1f} s, {peak >> 20} MiB"
        )


if __name__ == "__main__":
    main()
