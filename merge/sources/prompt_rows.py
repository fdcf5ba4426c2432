"""Rows of a router from token embeddings: for each row the direction of its prompts' summed embeddings.

The input is the embedding matrix (token, hidden). Parameters: `rows`, for each row of the result a pair (positive,
negative) of tuples of (token, how often). Each sum is brought to length 1, the negative one is subtracted, and the
difference brought to length 1 again; a row without tokens is zero. This is mergekit's gate_mode cheap_embed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

Counts = tuple[tuple[int, int], ...]


def prepare(ref: Derived, read: Read) -> Fill:
    (embedding,) = ref.inputs
    whole = np.stack([_row(embedding, read, *pair) for pair in ref.parameters["rows"]])
    flat = whole.astype(np.float32).reshape(-1)

    def fill(start: int, out: F32) -> None:
        out[:] = flat[start : start + len(out)]

    return fill


def held_bytes(ref: Derived) -> int:
    return 12 * ref.size


def _row(embedding: TensorRef, read: Read, positive: Counts, negative: Counts) -> npt.NDArray[np.float64]:
    row = unit(_sum(embedding, read, positive))
    return unit(row - unit(_sum(embedding, read, negative))) if negative else row


def _sum(embedding: TensorRef, read: Read, counts: Counts) -> npt.NDArray[np.float64]:
    hidden = embedding.shape[1]
    total, row = np.zeros(hidden), np.empty(hidden, np.float32)
    for token, times in counts:
        read(embedding, token * hidden, row)
        total += times * row.astype(np.float64)
    return total


def unit(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The vector at length 1; one that is as good as zero is only made longer, not blown up (as mergekit has it)."""
    return vector / max(float(np.sqrt((vector * vector).sum())), 1e-8)
