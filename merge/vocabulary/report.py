"""The differences between tokenizers, as plain data, for `merge tokenizers`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from merge.checkpoint import open_checkpoint
from merge.checkpoint.files import read_json
from merge.checkpoint.hub import locate_tokenizer
from merge.errors import CheckpointError
from merge.recipe.model import ModelRef
from merge.vocabulary.surface import same_tokens
from merge.vocabulary.tokenizer import Tokenizer, read_tokenizer

SAMPLES = {
    "English": "The quick brown fox jumps over the lazy dog, and nobody in the village thought it was remarkable.",
    "German": "Der Zug nach Königsberg fährt heute ausnahmsweise erst um Viertel nach zwölf über die große Brücke.",
    "Chinese": "春天来了，花园里的樱花开得非常漂亮，孩子们在树下唱歌跳舞。",
    "code": "def mean(values: list[float]) -> float:\n    return sum(values) / max(1, len(values))\n",
    "numbers": "3.14159265358979 + 2,718 = 2721.14159; 1024 x 768; 2026-11-22T07:30:00Z",
}
_SHOWN = 8  # samples of tokens


def describe(ref: ModelRef) -> tuple[Tokenizer, dict[str, Any]]:
    """The facts of a single tokenizer.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    directory = locate_tokenizer(ref)
    tokenizer = read_tokenizer(directory, ref.text)
    model = tokenizer.data["model"]
    facts: dict[str, Any] = {
        "tokenizer": ref.text,
        "type": tokenizer.kind,
        "alphabet": tokenizer.alphabet,
        "tokens": len(tokenizer.vocabulary),
        "added": len(tokenizer.added),
        "largest_id": tokenizer.n_ids - 1,
        "merges": len(model["merges"]) if "merges" in model else None,
        "normalizer": _outline(tokenizer.data.get("normalizer")),
        "pre_tokenizer": _outline(tokenizer.data.get("pre_tokenizer")),
        "special": dict(tokenizer.named),
        "chat_template": tokenizer.template is not None,
        "embedding_rows": _embedding_rows(ref, directory),
    }
    encoder = _encoder(tokenizer)
    try:
        facts["tokens_per_byte"] = {
            name: len(encoder.encode(text, add_special_tokens=False).ids) / len(text.encode())
            for name, text in SAMPLES.items()
        }
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{tokenizer.directory}: the tokenizer cannot encode a text ({error}).") from error
    return tokenizer, facts


def _encoder(tokenizer: Tokenizer) -> Any:
    import tokenizers

    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.data))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{tokenizer.directory}: the tokenizers library cannot read it ({error}).") from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _outline(part: Any) -> str | None:
    """The types in a normalizer or pre-tokenizer, in order."""
    if not isinstance(part, dict):
        return None
    for key in ("normalizers", "pretokenizers"):
        if isinstance(part.get(key), list):
            return " + ".join(filter(None, map(_outline, part[key])))
    return str(part.get("type"))


def _embedding_rows(ref: ModelRef, directory: str) -> int | None:
    """Rows of the embedding; without weights, vocab_size of config.json; None for a tokenizer alone."""
    from merge.architecture import is_embedding

    if any(name.endswith((".safetensors", ".bin")) for name in os.listdir(directory)):
        tensors = open_checkpoint(ref).tensors
        found = next((tensor.shape[0] for name, tensor in tensors.items() if is_embedding(name) and tensor.shape), None)
        if found is not None:
            return found
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        return None
    config = read_json(path, unique=False)
    text = config.get("text_config") or config
    rows = text.get("vocab_size") if isinstance(text, dict) else None
    return rows if isinstance(rows, int) else None


def compare(first: Tokenizer, other: Tokenizer) -> dict[str, Any]:
    """The differences of `other` from `first`."""
    ours, theirs = first.vocabulary, other.vocabulary
    shared = [token for token in theirs if token in ours]
    moved = [token for token in shared if ours[token] != theirs[token]]
    only_first = [token for token in ours if token not in theirs]
    only_other = [token for token in theirs if token not in ours]
    merges, other_merges = _merges(first), _merges(other)
    differ = [
        key
        for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor")
        if first.data.get(key) != other.data.get(key)
    ]
    return {
        "first": first.name,
        "other": other.name,
        "same_ids": not (moved or only_first or only_other),
        "shared": len(shared),
        "same_text": len(same_tokens(first, other)),
        "moved": len(moved),
        "only_first": len(only_first),
        "only_other": len(only_other),
        "moved_samples": [[token, ours[token], theirs[token]] for token in _some(moved)],
        "only_first_samples": _some(only_first),
        "only_other_samples": _some(only_other),
        "special": {
            role: [first.named.get(role), other.named.get(role)]
            for role in dict.fromkeys((*first.named, *other.named))
            if first.named.get(role) != other.named.get(role)
        },
        "merges_shared": len(merges & other_merges) if merges or other_merges else None,
        "merges_only_first": len(merges - other_merges) if merges or other_merges else None,
        "merges_only_other": len(other_merges - merges) if merges or other_merges else None,
        "differ": differ,
        "same_chat_template": first.template == other.template,
    }


def _some(tokens: Sequence[str]) -> list[str]:
    """A few of the tokens, spread over all of them."""
    return [token for token in tokens[:: max(1, -(-len(tokens) // _SHOWN))] if len(token) < 40]


def _merges(tokenizer: Tokenizer) -> set[tuple[str, ...]]:
    merges = tokenizer.data["model"].get("merges") or ()
    return {tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges}
