"""Small dense models, and mixtures of them that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TOKENIZER, write_json
from transformers import AutoConfig, AutoModelForCausalLM

from merge import build_plan, parse_recipe, run_plan

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def dense(path: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """A small random model of a family, float32, with a tokenizer of words w1 to w31."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | config)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(path)
    write_json(path / "tokenizer.json", TOKENIZER)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    return path


def mixture(out: Path, model: Path, more: str = "", expert: str = "", n: int = 4, mode: str = "random") -> Any:
    """The mixture of n times the same model, loaded; everything in the files is used, and nothing is missing."""
    experts = "".join(f"  - {{source_model: {model}{expert}}}\n" for _ in range(n))
    plan = build_plan(parse_recipe(f"base_model: {model}\ngate_mode: {mode}\nexperts:\n{experts}{more}"))
    run_plan(plan, out)
    code = "trust_remote_code" in " ".join(plan.notes)
    loaded, told = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=code, output_loading_info=True)
    assert not any(told.values()), told
    assert sum(parameter.numel() for parameter in loaded.parameters()) == plan.n_parameters
    return loaded.eval()
