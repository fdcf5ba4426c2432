"""A Llama of two layers with one token a letter, for tests of fine-tuning; made in a tenth of a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from string import ascii_lowercase
from typing import Any

LETTERS = ascii_lowercase + " =:.|\n" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ#?0123456789<>"
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tiny_llama(
    path: Path,
    *,
    bias: bool = False,
    tied: bool = False,
    context: int = 64,
    chat: bool = True,
    dtype: str = "bfloat16",
) -> Path:
    """A model directory: random weights, and a tokenizer that has <pad>, <eos> and the marks of its chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<pad>", "<eos>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=marks[3:],
    )
    if chat:
        fast.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        attention_bias=bias,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts `abc=` with the answer `CBA`-like capitals in order: a rule a tiny model picks up quickly."""
    rng = random.Random(seed)
    drawn = ["".join(rng.choices(ascii_lowercase[:6], k=rng.randint(2, 5))) for _ in range(count)]
    return [{"prompt": f"{word}=", "completion": word.upper()} for word in drawn]
