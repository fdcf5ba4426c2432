"""Kernels that rotate the rows of a matrix by orthogonal blocks or reflections.

Each row is computed by itself, in one order, whatever rows are asked for at once.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F64
from merge.kernels.bits import kernel


@kernel
def rotate(values: F64, blocks: F64) -> None:
    """values (rows, n · size) float64 -> values · diag(blocks)^T; blocks (n, size, size) float64"""
    n_blocks, size, _ = blocks.shape
    turned = np.empty(blocks.shape, np.float64)  # transposed, so that the sums of a row of a block go side by side
    for block in range(n_blocks):
        for i in range(size):
            for j in range(size):
                turned[block, j, i] = blocks[block, i, j]
    before = np.empty(size, np.float64)
    for row in range(values.shape[0]):
        for block in range(n_blocks):
            sums = values[row, block * size : (block + 1) * size]
            for i in range(size):
                before[i], sums[i] = sums[i], 0.0
            for j in range(size):
                column, factor = turned[block, j], before[j]
                for i in range(size):
                    sums[i] += column[i] * factor


@kernel
def reflect(values: F64, directions: F64) -> None:
    """values (rows, n) float64, each row reflected at directions (k, n), unit vectors, one after another"""
    for row in range(values.shape[0]):
        for k in range(directions.shape[0]):
            total = 0.0
            for j in range(values.shape[1]):
                total += values[row, j] * directions[k, j]
            for j in range(values.shape[1]):
                values[row, j] -= 2.0 * total * directions[k, j]
