"""Packs examples into rows of a batch: one example each, or several that do not attend to each other.

Packed rows have position ids that restart with every example. Given these and no attention mask, transformers lets
a token look only at its own example, in every attention implementation, on a CPU too; finetune/checks.py makes sure of
it for the model at hand. Targets are shifted within each example: no token is to predict the next example's first.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from finetune.data.encode import Example
from finetune.keys import KEYS, Config
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


def max_length(config: Config, context: int | None) -> int:
    """The maximum tokens of a sequence, without a learnt prompt. Raises UsageError beyond the model's context."""
    if context is None:
        return config.max_length or 2048
    learnt = config.virtual_tokens if config.train in KEYS["virtual_tokens"].only else 0
    length = config.max_length or min(context - learnt, 2048)
    if length > context:
        raise UsageError(f"max_length: {length:,} is more than the model's context of {context:,} tokens.")
    if length + learnt > context or length < 2:
        raise UsageError(
            f"virtual_tokens: {learnt:,} and sequences of {max(length, 2):,} tokens are more than the model's context "
            f"of {context:,}. Use fewer, or a smaller max_length."
        )
    return length


class BatchRow(NamedTuple):
    """The examples of one sequence with their numbers. `packed`: it has position ids in place of a mask."""

    examples: list[tuple[int, Example]]
    packed: bool


@dataclass(frozen=True)
class Rows:
    """A data set for torch."""

    examples: tuple[Example, ...]
    rows: tuple[tuple[int, ...], ...]
    packed: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> BatchRow:
        return BatchRow([(i, self.examples[i]) for i in self.rows[index]], self.packed)

    @property
    def tokens(self) -> int:
        return sum(len(self.examples[i]) for row in self.rows for i in row)


def make_rows(examples: Sequence[Example], length: int, packed: bool) -> Rows:
    """Best fit, longest first: each example goes into the fullest row with room for it."""
    if not packed:
        return Rows(tuple(examples), tuple((i,) for i in range(len(examples))), False)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i)):
        need = len(examples[i])
        at = bisect.bisect_left(room, (need, -1))
        if at == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(i)
        bisect.insort(room, (left - need, row))
    return Rows(tuple(examples), tuple(map(tuple, rows)), True)


class Batch(TypedDict, total=False):
    """Rows as tensors; see an objective's `collate` for which it makes, and their shapes."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: Tensor
    reference: Tensor
    wanted: Tensor
    wrong: Tensor
    examples: list[int]  # numbers in the data set
    counted: int | None  # rows of a batch that do not repeat others


def collate(rows: Sequence[BatchRow], pad: int) -> Batch:
    """Tensors of a batch, padded on the right to its longest row.

    Returns:
        input_ids (row, token) int64; targets (row, token) int64: the token to predict here, or IGNORED; weights (row,
        token) float32 of these; attention_mask (row, token) int64, or for packed rows position_ids; examples: their
        numbers in the data set.
    """
    import torch

    longest = max(sum(len(example) for _, example in row.examples) for row in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    targets = np.full((len(rows), longest), IGNORED, np.int64)
    weights = np.zeros((len(rows), longest), np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    positions = np.zeros((len(rows), longest), np.int64)
    for r, row in enumerate(rows):
        at = 0
        for _, example in row.examples:
            end = at + len(example)
            ids[r, at:end] = example.ids
            learnt = example.weights[1:] > 0
            targets[r, at : end - 1] = np.where(learnt, example.ids[1:], IGNORED)
            weights[r, at : end - 1] = example.weights[1:]
            mask[r, at:end] = 1
            positions[r, at:end] = np.arange(len(example))
            at = end
        positions[r, at:] = np.arange(longest - at)  # the padding is one more example, which no token attends to
    batch: Batch = {
        "input_ids": torch.from_numpy(ids),
        "targets": torch.from_numpy(targets),
        "weights": torch.from_numpy(weights),
        "examples": [i for row in rows for i, _ in row.examples],
    }
    if rows[0].packed:
        batch["position_ids"] = torch.from_numpy(positions)
    else:
        batch["attention_mask"] = torch.from_numpy(mask)
    return batch
