"""scaled: FP8 numbers times their scales, one for each block of a matrix.

inputs: the weight as it is stored, seen as a matrix (product of all sizes but the last, last); the scales, in order the
row-major grid (ceil(rows / block rows), ceil(columns / block columns)). parameters: `block`, the (rows, columns)
that one scale covers. The product is rounded to float32.
"""

from __future__ import annotations

import math

import numpy as np

from merge.arrays import F32
from merge.chunks import Chunks
from merge.decode import apply_scales
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def scaled(weight: TensorRef, scale: TensorRef, block: tuple[int, int]) -> Derived:
    """The weight's values. An output that keeps its input's dtype is bfloat16, for FP8 needs scales."""
    return Derived(weight.name, "BF16", weight.shape, "scaled", (weight, scale), {"block": block}, how="decoded")


def prepare(ref: Derived, read: Read) -> Fill:
    (weight, scale), block = ref.inputs, ref.parameters["block"]
    columns = ref.shape[-1] if ref.shape else 1
    values = np.empty(scale.size, np.float32)
    read(scale, 0, values)
    grid = values.reshape(-(-math.prod(ref.shape[:-1]) // block[0]), -(-columns // block[1]))

    def fill(start: int, out: F32) -> None:
        read(weight, start, out)
        if len(out):
            apply_scales(out, start, columns, block, grid)

    return fill


def rounding(ref: Derived) -> float:
    return 0.026 if ref.inputs[0].dtype == "F8_E4M3" else 0.052  # 3 bits of mantissa, measured: docs/tools.md; 2 bits


def held_bytes(ref: Derived) -> int:
    """The scales as float32, and a block as it is stored."""
    return 8 * ref.inputs[1].size + Chunks.of(ref.shape).length
