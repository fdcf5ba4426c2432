"""An embedding with some rows replaced by an adapter (PEFT's trainable_token_indices).

inputs: the embedding (vocabulary, width) and the rows (n, width). parameters: `indices`, the token of each row.
Source: peft 0.21.2, tuners/trainable_tokens/layer.py, get_merged_weights.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def replace_rows(weight: TensorRef, rows: TensorRef, indices: tuple[int, ...]) -> TensorRef:
    """The ref of the embedding with its rows replaced; every index must lie in it."""
    return Derived(weight.name, weight.dtype, weight.shape, "token_rows", (weight, rows), {"indices": indices})


def prepare(ref: Derived, read: Read) -> Fill:
    weight, rows = ref.inputs
    width = ref.shape[1]
    values = np.empty(rows.size, np.float32)
    read(rows, 0, values)
    places = [(token * width, values[i * width : (i + 1) * width]) for i, token in enumerate(ref.parameters["indices"])]

    def fill(start: int, out: F32) -> None:
        read(weight, start, out)
        for place, row in places:
            first, last = max(start, place), min(start + len(out), place + width)
            if first < last:
                out[first - start : last - start] = row[first - place : last - place]

    return fill


def held_bytes(ref: Derived) -> int:
    return 2 * 4 * ref.inputs[1].size
