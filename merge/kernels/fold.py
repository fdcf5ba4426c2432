"""Kernels that fold a product of two thin matrices into a matrix, row by row.

Every number is summed in one order, whatever rows are asked for at once; BLAS promises no such thing.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32, F64
from merge.kernels.bits import kernel

_TILE = 512  # columns whose part of the right factor stays in the first-level cache from row to row


@kernel
def add_product(left: F32, right: F32, scaling: float, out: F32) -> None:
    """out (rows, columns) float32 += scaling · left (rows, rank) · right (rank, columns), both float32; in float64"""
    rank, columns = right.shape
    sums = np.empty(_TILE, np.float64)
    for start in range(0, columns, _TILE):
        width = min(_TILE, columns - start)
        for row in range(out.shape[0]):
            sums[:] = 0.0
            for k in range(0, rank - 3, 4):
                a, b = np.float64(left[row, k]), np.float64(left[row, k + 1])
                c, d = np.float64(left[row, k + 2]), np.float64(left[row, k + 3])
                p, q = right[k, start : start + width], right[k + 1, start : start + width]
                s, t = right[k + 2, start : start + width], right[k + 3, start : start + width]
                for j in range(width):
                    sums[j] += (a * p[j] + b * q[j]) + (c * s[j] + d * t[j])
            for k in range(rank - rank % 4, rank):
                a = np.float64(left[row, k])
                p = right[k, start : start + width]
                for j in range(width):
                    sums[j] += a * p[j]
            into = out[row, start : start + width]
            for j in range(width):
                into[j] = np.float32(into[j] + scaling * sums[j])


@kernel
def accumulate(left: F64, right: F64, scaling: float, out: F64) -> None:
    """out (rows, columns) += scaling · left (rows, rank) · right (rank, columns), all float64"""
    rank, columns = right.shape
    sums = np.empty(_TILE, np.float64)
    for start in range(0, columns, _TILE):
        width = min(_TILE, columns - start)
        for row in range(out.shape[0]):
            sums[:] = 0.0
            for k in range(rank):
                a, p = left[row, k], right[k, start : start + width]
                for j in range(width):
                    sums[j] += a * p[j]
            into = out[row, start : start + width]
            for j in range(width):
                into[j] += scaling * sums[j]


@kernel
def scale_rows(magnitude: F32, first: int, out: F32) -> None:
    """out (rows, columns) float32: row i gets the length magnitude[first + i], as DoRA's folded matrix has it"""
    for row in range(out.shape[0]):
        square = 0.0
        for j in range(out.shape[1]):
            square += np.float64(out[row, j]) * np.float64(out[row, j])
        factor = np.float64(magnitude[first + row]) / np.sqrt(square)
        for j in range(out.shape[1]):
            out[row, j] = np.float32(out[row, j] * factor)


@kernel
def add_column_squares(values: F32, squares: F64) -> None:
    """squares (columns,) float64 += the squares of values (rows, columns) float32, row after row"""
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            squares[j] += np.float64(values[row, j]) * np.float64(values[row, j])


@kernel
def scale_columns(factor: F64, out: F32) -> None:
    """out (rows, columns) float32 times factor (columns,) float64"""
    for row in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[row, j] = np.float32(out[row, j] * factor[j])
