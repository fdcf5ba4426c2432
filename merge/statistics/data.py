"""Reads texts into batches of token ids. No padding: the sequences of a batch have equal lengths."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.quoting import quoted
from merge.textfile import read_text


@dataclass(frozen=True)
class Batches:
    """`all`: (sequence, token) lists of token numbers, in the order they are used."""

    all: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def tokens(self) -> int:
        return sum(len(batch) * len(batch[0]) for batch in self.all)

    @property
    def sequences(self) -> int:
        return sum(map(len, self.all))


def read_texts(path: Path) -> list[str]:
    """The "text" of each line of a .jsonl file; of any other file the lines that are not blank."""
    lines = read_text(path, "--data").split("\n")
    if path.suffix not in (".jsonl", ".json"):
        return [line for line in lines if line.strip()]
    return [_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = parse_json(line)["text"]
    except (ValueError, KeyError, TypeError, IndexError):
        text = None
    if not isinstance(text, str):
        raise UsageError(f'--data {path}:{number}: expected an object with a "text", found {quoted(line)}.')
    return text


def make_batches(tokenizer: object, texts: list[str], max_tokens: int, length: int, size: int, seed: int) -> Batches:
    """Texts in an order drawn from the seed, cut to sequences until there are enough tokens, grouped by length.

    Args:
        max_tokens: the most tokens in all.
        length: the most tokens of a sequence; a longer text gives several.
        size: sequences of a batch.
    """
    drawn = list(texts)
    random.Random(seed).shuffle(drawn)
    sequences: list[tuple[int, ...]] = []
    left = max_tokens
    for sequence in _sequences(tokenizer, drawn, length):
        kept = sequence[:left]
        if len(kept) < 2:  # no token is predicted
            continue
        sequences.append(kept)
        left -= len(kept)
        if left < 2:
            break
    if not sequences:
        raise UsageError("--data: no text of at least two tokens.")
    sequences.sort(key=len, reverse=True)  # stable; the longest first, so that memory is short at once or never
    batches: list[tuple[tuple[int, ...], ...]] = []
    for _, alike in itertools.groupby(sequences, len):
        group = list(alike)
        batches += [tuple(group[start : start + size]) for start in range(0, len(group), size)]
    return Batches(tuple(batches))


def _sequences(tokenizer: Any, texts: list[str], length: int) -> Iterator[tuple[int, ...]]:
    for text in texts:
        numbers = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(numbers), length):
            yield tuple(numbers[start : start + length])
