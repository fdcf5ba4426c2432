"""GGUF files of small random models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from conftest import write_json
from tiny_models import model_of, sizes

from merge.tools.to_gguf.write import write_gguf


def byte_tokenizer(path: Path) -> None:
    """256 bytes as GPT-2 writes them; one merge; an end of text."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"th": 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(
        path / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [
                {"id": 257, "content": "<end>", "special": True, "single_word": False}
                | {"lstrip": False, "rstrip": False, "normalized": False}
            ],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["t", "h"]]},
        },
    )
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})


def small_model(path: Path, kind: str = "Llama", **settings: Any) -> Path:
    """A checkpoint whose rows are divided by blocks of every type but those of 256."""
    import transformers

    wide = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "eos_token_id": 257}
    config = getattr(transformers, f"{kind}Config")(**(sizes() | wide | settings))
    model_of(path, config)
    byte_tokenizer(path)
    return path


def small_gguf(path: Path, to: str = "q8_0") -> Path:
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(str(small_model(Path(folder) / "m", num_hidden_layers=1)), path, to)
    return path
