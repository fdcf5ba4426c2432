"""Small tokenizers, trained on the spot, and models that have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.plan import Plan

TEXTS = {
    "sea": "the ship sails over the wide sea while the sailors sing of the harbour and the shining shore " * 4,
    "code": "def merge(first, second): return [first[i] + second[i] for i in range(len(first))]  # adds lists " * 4,
}


@cache
def _trained(kind: str, text: str, size: int) -> str:
    corpus = [TEXTS[text]]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=256 + size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def train(kind: str, text: str, *, size: int = 60, added: Sequence[str] = (), special: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of `kind` ("bytes", "unigram", "wordpiece") with `size` entries besides the 256 bytes."""
    tokenizer = Tokenizer.from_str(_trained(kind, text, size))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def give(
    make_model: Callable[..., Path],
    path: Path,
    tokenizer: Tokenizer | None,
    *,
    seed: int,
    padding: int = 0,
    rows: int | None = None,
    config: Mapping[str, Any] | None = None,
    tied: bool = False,
    dtype: str = "F32",
    hidden: int = 8,
) -> Path:
    """A tiny Llama with this tokenizer: as many rows as tokens, and `padding` more; `config`: tokenizer_config.json."""
    n = rows if rows is not None else tokenizer.get_vocab_size() + padding if tokenizer is not None else 32
    random = np.random.default_rng(seed)
    extra = {"model.embed_tokens.weight": random.standard_normal((n, hidden)).astype(np.float32)}
    if not tied:
        extra["lm_head.weight"] = random.standard_normal((n, hidden)).astype(np.float32)
    if dtype == "F16":
        extra = {name: values.astype(np.float16) for name, values in extra.items()}
    make_model(path, seed=seed, hidden=hidden, extra=extra, tied=tied, layers=1, dtype=dtype)
    settings = json.loads((path / "config.json").read_text()) | {"vocab_size": n}
    (path / "config.json").write_text(json.dumps(settings))
    if tokenizer is None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    else:
        tokenizer.save(str(path / "tokenizer.json"))
        written = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
        (path / "tokenizer_config.json").write_text(json.dumps(written))
    return path


def rows_of(path: Path, name: str = "model.embed_tokens.weight") -> np.ndarray:
    """Rows of a tensor of a checkpoint, in its own dtype."""
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            return tensors[name]
    raise KeyError(name)


def ids_of(path: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True))


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The same with <s> before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


Make = Callable[..., Path]


def linear(*models: Path, weights: tuple[float, ...] = (), more: str = "") -> Plan:
    lines = [
        f"  - {{model: {model}, parameters: {{weight: {weight}}}}}\n"
        for model, weight in zip(models, weights or (1.0,) * len(models), strict=True)
    ]
    return build_plan(parse_recipe("merge_method: linear\nmodels:\n" + "".join(lines) + more + "\n"))


def run(plan: Plan, out: Path, **options: Any) -> Path:
    run_plan(plan, out, **options)
    assert not verify_output(out).problems
    return out


@pytest.fixture
def pair(tmp_path: Path, make_model: Make) -> tuple[Path, Path]:
    """Two models with byte-level BPE tokenizers of other texts, each with added tokens of its own."""
    ours = train("bytes", "sea", added=["<wave>"], special=["<s>", "<both>"])
    theirs = train("bytes", "code", size=50, added=["<tab>"], special=["<both>", "<end>"])
    a = give(make_model, tmp_path / "a", ours, seed=1)
    return a, give(make_model, tmp_path / "b", theirs, seed=2)
