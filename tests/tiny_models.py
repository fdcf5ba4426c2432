"""Small models of any class of transformers, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TOKENIZER, VOCABULARY, write_json


def model_of(path: Path, config: Any) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from the initial values, so that layers do something
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    write_json(path / "tokenizer.json", TOKENIZER)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})


def sizes(tied: bool = False, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
