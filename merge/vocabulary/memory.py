"""Estimates the memory of tokenizers, as Python objects and in the tokenizers library, from measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from merge.vocabulary.tokenizer import Tokenizer
from merge.vocabulary.union import Union

# Bytes for a token, and for a merge: of a tokenizer that is read; of one that is made, afterwards and while the
# tokenizers library checks it. That library holds a Unigram model as a tree of letters.
_READ, _MADE, _CHECKED, _UNIGRAM = 290, 190, 540, 1700
_COMPARED = 13  # for each byte of tokenizer.json
_CONVERTED = 310 << 20  # for transformers with torch, which make tokenizer.json from other files


@dataclass(frozen=True)
class TokenizerMemory:
    """Bytes: from the plan on, and at most while the tokenizer is made."""

    held: int = 0
    peak: int = 0


def tokenizer_memory(tokenizers: Iterable[Tokenizer], made: Union | None = None) -> TokenizerMemory:
    """Bytes of tokenizers, each counted once, with the one that is made of them."""
    read = list({id(tokenizer): tokenizer for tokenizer in tokenizers}.values())
    held = _READ * sum(tokenizer.n_entries for tokenizer in read)
    held += _CONVERTED if any(tokenizer.is_converted for tokenizer in read) else 0
    if made is None:
        return TokenizerMemory(held, held)
    is_unigram = made.data["model"].get("type") == "Unigram"
    n = len(made.vocabulary) + len(made.data["model"].get("merges") or ())
    return TokenizerMemory(
        held + n * (_UNIGRAM if is_unigram else _MADE), held + n * (_UNIGRAM if is_unigram else _CHECKED)
    )


def compared_memory(n_bytes: int) -> TokenizerMemory:
    """Bytes for comparing two tokenizers, which are read one at a time, from the size of the larger file."""
    return TokenizerMemory(0, _COMPARED * n_bytes)
