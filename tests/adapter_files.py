"""Tiny bases with adapters that PEFT made, and what folding them gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from merge import build_plan, parse_recipe, run_plan
from merge.plan import Plan

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}


def make_base(path: Path, kind: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A tiny transformers model of random numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = (GPT2 if kind == "gpt2" else LLAMA) | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def make_adapter(
    path: Path, base: Path, dtype: str = "float32", seed: int = 1, noise: float = 0.1, **settings: Any
) -> dict[str, Any]:
    """An adapter of random numbers, as PEFT saves it; returns what merge_and_unload makes of the base."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    peft.save_pretrained(path)
    # from the files, as anybody gets it
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    tensors = {name: values.detach().float().numpy().copy() for name, values in merged.state_dict().items()}
    return tensors | {"tied": merged.config.tie_word_embeddings}


def plan_of(reference: str, **keys: Any) -> Plan:
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]} | keys
    return build_plan(parse_recipe(json.dumps(recipe)))


def fold(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    """`base+adapter` written to the disk."""
    run_plan(plan_of(f"{base}+{adapter}"), out, **options)
    return read(out)


def read(out: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file as load_torch

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_torch(file)
    return {name: values.float().numpy() for name, values in tensors.items()}


def steps_apart(found: np.ndarray, expected: np.ndarray, before: np.ndarray) -> float:
    """The largest distance of two folded tensors in steps of bfloat16.

    The step is that of the larger of the weight and its change. Where they cancel, or the terms of the change do, PEFT
    has lost digits by its sums in float32: a millionth of the largest change is not counted.
    """
    change = np.abs(found - before)
    larger = np.maximum(np.maximum(np.abs(before), change), np.abs(found))
    step = 2.0 ** (np.floor(np.log2(np.maximum(larger, 1e-30))) - 7)
    return float(((np.abs(found - expected) - 1e-6 * change.max()) / step).max())
