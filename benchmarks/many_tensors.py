"""A checkpoint of many small tensors: 61 layers of 256 experts each, as DeepSeek-V3 has, 45,099 tensors of 228 MB.

    python benchmarks/many_tensors.py DIR [--method ties] [--profile]

Writes a base and two fine-tunes into DIR, if they are not there, plans and merges them, and says how long each took,
in seconds by the clock and of processor time, milliseconds a tensor, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LAYERS, DENSE, EXPERTS, HIDDEN, EXPERT, VOCABULARY = 61, 3, 256, 64, 40, 1000


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("q_a_proj", (24, HIDDEN)),
            ("q_b_proj", (4 * 24, 24)),
            ("kv_a_proj_with_mqa", (16 + 8, HIDDEN)),
            ("kv_b_proj", (4 * 32, 16)),
            ("o_proj", (HIDDEN, 4 * 16)),
        ):
            yield f"{at}self_attn.{name}.weight", shape
        yield f"{at}self_attn.q_a_layernorm.weight", (24,)
        yield f"{at}self_attn.kv_a_layernorm.weight", (16,)
        if layer < DENSE:
            yield from ((f"{at}mlp.{name}.weight", shape) for name, shape in _mlp(4 * EXPERT))
        else:
            yield f"{at}mlp.gate.weight", (EXPERTS, HIDDEN)
            yield f"{at}mlp.gate.e_score_correction_bias", (EXPERTS,)
            for expert in range(EXPERTS):
                yield from ((f"{at}mlp.experts.{expert}.{name}.weight", shape) for name, shape in _mlp(EXPERT))
            yield from ((f"{at}mlp.shared_experts.{name}.weight", shape) for name, shape in _mlp(EXPERT))
        yield f"{at}input_layernorm.weight", (HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _mlp(width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("gate_proj", (width, HIDDEN)), ("up_proj", (width, HIDDEN)), ("down_proj", (HIDDEN, width))


CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * EXPERT,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def write(directory: Path, seed: int, tuned: bool) -> None:
    """One model.safetensors of bfloat16; a fine-tune is the base with small changes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))
    header, at = {}, 0
    for name, shape in shapes():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    values = np.random.default_rng(0).standard_normal(at // 2, np.float32) * 0.02
    if tuned:
        values += np.random.default_rng(seed).standard_normal(at // 2, np.float32) * 0.002
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + (values.view(np.uint32) >> 16).astype("<u2").tobytes())


def measured(command: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of processor time, peak bytes of a command; ends with its message if it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(message.decode()[-2000:])
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--profile", action="store_true", help="also the functions that take longest")
    arguments = parser.parse_args()
    root: Path = arguments.directory.resolve()
    for seed, name in enumerate(("base", "a", "b")):
        if not (root / name).is_dir():
            write(root / name, seed, name != "base")
    recipe, out = root / "recipe.yaml", root / "out"
    recipe.write_text(
        f"merge_method: {arguments.method}\nbase_model: {root}/base\ndtype: bfloat16\n"
        f"models: [{{model: {root}/a}}, {{model: {root}/b}}]\nparameters: {{density: 0.5, weight: 0.5}}\n"
    )
    n = sum(1 for _ in shapes())
    profiled = ["-m", "cProfile", "-s", "tottime"] if arguments.profile else []
    for what, command in (
        ("plan", ["plan", str(recipe)]),
        ("run", ["run", str(recipe), "-o", str(out), "--force", "--quiet"]),
    ):
        if arguments.profile:
            done = subprocess.run([sys.executable, *profiled, "-m", "merge", *command], capture_output=True, text=True)
            print("\n".join(done.stdout.splitlines()[:60]))
            continue
        seconds, cpu, peak = measured([sys.executable, "-m", "merge", *command])
        each = cpu / n * 1000
        print(
            f"{what}: {n:,} tensors, {seconds:.1f} s, processor {cpu:.1f} s ({each:.2f} ms a tensor), {peak >> 20} MiB"
        )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
