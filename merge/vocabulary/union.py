"""Unites tokenizers of one family: the first one's ids stay, further tokens get the next ids.

BPE: the first one's merges keep their ranks, the others' new ones follow in their order, so a text is first cut as the
first tokenizer cuts it and then merged on. Unigram: new pieces keep their scores. WordPiece, WordLevel: new entries.
Normalizer, pre-tokenizer, decoder and templates of special tokens are the first one's.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import RecipeError
from merge.vocabulary.tokenizer import Tokenizer

_BELOW = 10.0  # an added token's score in a Unigram model: so far below all pieces that none is cut for it


@dataclass(frozen=True)
class Union:
    """The contents of tokenizer.json, token -> id, and notes."""

    data: dict[str, Any]
    vocabulary: dict[str, int]
    notes: tuple[str, ...]
    n_new: int


def unite(tokenizers: Sequence[Tokenizer], extra: Sequence[str] = (), without: Collection[str] = ()) -> Union:
    """One tokenizer with the tokens of all.

    Args:
        tokenizers: the first one's ids stay.
        extra: further tokens to add; those that are there already are left as they are.
        without: added tokens to leave out, none of which is in a model's own vocabulary.

    Raises:
        RecipeError: they are of different families.
    """
    first, *others = tokenizers
    for other in others:
        _check_family(first, other)
    builder = _UnionBuilder(first, without)
    notes = [note for other in others for note in builder.add(other)]
    builder.add_extra(extra)
    return Union(builder.finished(), builder.vocabulary, tuple(notes), builder.n_new)


def _check_family(first: Tokenizer, other: Tokenizer) -> None:
    ours, theirs = _family(first), _family(other)
    if ours != theirs:
        raise RecipeError(
            f'tokenizer_source: "union" needs tokenizers of one family: {first.name} has {ours}, {other.name} has '
            f"{theirs}. Name one of them as tokenizer_source, or give one model the other's tokenizer first "
            "(merge transplant)."
        )


def _family(tokenizer: Tokenizer) -> str:
    spelling = {"bytes": "byte-level ", "metaspace": "SentencePiece ", "##": "", "plain": ""}[tokenizer.alphabet]
    model = tokenizer.data["model"]
    affixes = [
        f'{key.replace("_", " ")} "{model[key]}"'
        for key in ("continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    return f"{spelling}{tokenizer.kind}" + (f" ({', '.join(affixes)})" if affixes else "")


class _UnionBuilder:
    def __init__(self, first: Tokenizer, without: Collection[str]) -> None:
        self.first, self.without = first, without
        vocab = first.data["model"]["vocab"]
        self.model: dict[str, Any] = {
            **first.data["model"],
            "vocab": copy.copy(vocab),
        }  # the other changing parts are replaced
        self.data = {**first.data, "model": self.model}
        self.vocabulary = {token: number for token, number in first.vocabulary.items() if token not in without}
        self.added = {content: dict(entry) for content, entry in first.added.items() if content not in without}
        self.n_new = 0
        self._next = max(self.vocabulary.values(), default=-1) + 1
        self._pieces: dict[str, float | None] = {}  # new tokens of the model itself, with scores for Unigram
        self._merges: list[Any] = []
        self._known_merges = {_pair(merge) for merge in self.model.get("merges") or ()}

    def add(self, other: Tokenizer) -> list[str]:
        notes = []
        pieces = _pieces(other)
        for token in sorted(other.vocabulary, key=lambda token: other.vocabulary[token]):
            if token in self.vocabulary or token in self.without:
                continue
            if token in other.added:
                self._add_token(token, other.added[token])
            else:
                self._give_id(token)
                self._pieces[token] = pieces[token]
        for merge in other.data["model"].get("merges") or ():
            pair = _pair(merge)
            if pair not in self._known_merges:
                self._known_merges.add(pair)
                self._merges.append(pair)
        for content, entry in other.added.items():
            ours = self.added.get(content)
            if ours is not None and _flags(ours) != _flags(entry):
                notes.append(
                    f'the added token "{content}" has other flags in {other.name}; those of the first are kept'
                )
        differ = [
            key.replace("_", "-")
            for key in ("normalizer", "pre_tokenizer")
            if other.data.get(key) != self.first.data.get(key)
        ]
        if differ:
            notes.append(f"the {' and '.join(differ)} of {other.name} differ from {self.first.name}'s, which are kept")
        return notes

    def add_extra(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            if token not in self.vocabulary:
                self._add_token(token, {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True})

    def _add_token(self, content: str, entry: dict[str, object]) -> None:
        self._give_id(content)
        self.added[content] = {"special": False, **entry, "id": self.vocabulary[content], "content": content}

    def _give_id(self, token: str) -> None:
        self.vocabulary[token] = self._next
        self._next += 1
        self.n_new += 1

    def finished(self) -> dict[str, Any]:
        """tokenizer.json.

        The library numbers added tokens that are not in the model's vocabulary by counting on from its size, so where
        the model's own tokens come behind an added one, all added tokens have to be in its vocabulary too.
        """
        self.data["added_tokens"] = sorted(
            ({"id": entry["id"], **entry} for entry in self.added.values()), key=lambda entry: entry["id"]
        )
        model_tokens = _pieces(self.first)
        if self._pieces or any(entry["id"] < len(model_tokens) for entry in self._unplaced(model_tokens)):
            self._place_all()
        if self._merges:
            self.model["merges"] = [list(_pair(merge)) for merge in (*self.model["merges"], *self._merges)]
        return self.data

    def _unplaced(self, model_tokens: dict[str, float | None]) -> list[dict[str, Any]]:
        return [entry for entry in self.added.values() if entry["content"] not in model_tokens]

    def _place_all(self) -> None:
        vocab = self.model["vocab"]
        if isinstance(vocab, dict):
            vocab.update(sorted(self.vocabulary.items(), key=lambda item: item[1]))
            return
        lowest = min((score for _, score in vocab), default=0.0) - _BELOW
        by_id = {number: token for token, number in self.vocabulary.items()}
        for number in range(len(vocab), self._next):
            token = by_id.get(number, f"<unused_{number}>")
            score = self._pieces.get(token)
            vocab.append([token, lowest if score is None else score])


def _pieces(tokenizer: Tokenizer) -> dict[str, float | None]:
    """The model's own tokens, with scores if it has them."""
    vocab = tokenizer.data["model"]["vocab"]
    if isinstance(vocab, list):
        return {token: float(score) for token, score in vocab}
    return dict.fromkeys(vocab)


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, written as "a b" or as [a, b]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return str(left), str(right)


def _flags(entry: dict[str, object]) -> tuple[bool, ...]:
    return tuple(bool(entry.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special"))
