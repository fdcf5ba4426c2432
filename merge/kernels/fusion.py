"""Fused kernel of arcee_fusion: the divergence of each row, quantiles of what follows from it, then a choice by entry.

Where changes are small, as fine-tunes are, exponentials and logarithms are plain polynomials: they run in vector
registers, 3 ns an entry in place of 30.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from merge.kernels.bits import as_f32, kernel
from merge.kernels.coefficients import FUSION_EPSILON, FUSION_SHARES, fusion_threshold
from merge.kernels.computed import Computed
from merge.kernels.elementwise import weighted_sum
from merge.kernels.encode import LANES
from merge.kernels.functions import NEAR, exp, exp_down, expm1, expm1_near, log1p
from merge.kernels.protocol import Block, Combine, Floats, FusedTensor
from merge.kernels.selection import kth_bits

_NEARLY = 0.14  # below this `_relative` is exact to rounding
_SMALL = NEAR / 2  # largest change of a row for which the polynomials are exact to rounding


def arcee_fusion(tensor: FusedTensor) -> Combine:
    width = tensor.shape[-1] if tensor.shape else 1
    if width <= 1 or not tensor.size:
        return lambda block, out: weighted_sum(block.raw[1:], (1.0,), 1.0, out)  # no divergence: all are equal
    divergences = _divergences(tensor, width)
    sizes = Computed(tensor, lambda block, out: _importance(block.raw, divergences, width, block.start, out))
    bits = kth_bits(sizes, [tensor.size - int(share * (tensor.size - 1)) for share in FUSION_SHARES])
    least = fusion_threshold(*np.array(bits, np.uint32).view(np.float32).tolist())

    def combine(block: Block, out: Floats) -> None:
        _importance(block.raw, divergences, width, block.start, out)
        _choose(block.raw, least, out)

    return combine


def _divergences(tensor: FusedTensor, width: int) -> npt.NDArray[np.float64]:
    """Of each row, float64"""
    if len(tensor.shape) < 2:  # one row, which may lie in several chunks
        raw = np.concatenate(tensor.map_chunks(lambda block: block.raw.copy()), axis=1)
        return np.array([_divergence(raw[1], raw[0], np.empty(width))])
    found = np.empty(tensor.size // width)

    def rows(block: Block) -> None:
        _row_divergences(block.raw, width, found[block.start // width :])

    tensor.map_chunks(rows)
    return found


@kernel
def _row_divergences(raw: Any, width: int, out: Any) -> None:
    room = np.empty(width, np.float64)
    for row in range(raw.shape[1] // width):
        span = slice(row * width, (row + 1) * width)
        out[row] = _divergence(raw[1, span], raw[0, span], room)


@kernel
def _divergence(wide: Any, base: Any, room: Any) -> Any:
    """KL(softmax wide || softmax base), see merge.methods.arcee_fusion.divergence; room (n,) float64 is written"""
    top, most = as_f32(base[0]), np.float64(0)
    for i in range(len(base)):
        b = as_f32(base[i])
        top = max(top, b)
        most = max(most, abs(np.float64(as_f32(wide[i])) - np.float64(b)))
    finite = 0
    for i in range(len(base)):  # comparisons above overlook NaN
        finite += abs(as_f32(base[i])) < np.inf and abs(as_f32(wide[i])) < np.inf
    if most < _SMALL and finite == len(base):
        return _small_divergence(wide, base, np.float64(top), room)
    return _any_divergence(wide, base, room)


@kernel
def _small_divergence(wide: Any, base: Any, top: Any, room: Any) -> Any:
    """What the definition computes where changes are below 1, with polynomials for changes below _SMALL"""
    lanes = np.zeros((3, LANES), np.float64)
    sums, gains, parts = lanes[0], lanes[1], lanes[2]
    for start in range(0, len(base), LANES):
        b, x, e = base[start : start + LANES], wide[start : start + LANES], room[start : start + LANES]
        for lane in range(len(b)):
            value = np.float64(as_f32(b[lane]))
            e[lane] = exp_down(value - top)
            sums[lane] += e[lane]
            gains[lane] += e[lane] * expm1_near(np.float64(as_f32(x[lane])) - value)
    total = sums.sum()
    shift, share = log1p(gains.sum() / total), 1 / total
    for start in range(0, len(base), LANES):
        b, x, e = base[start : start + LANES], wide[start : start + LANES], room[start : start + LANES]
        for lane in range(len(b)):
            before = e[lane] * share
            q = before + FUSION_EPSILON
            change = np.float64(as_f32(x[lane])) - np.float64(as_f32(b[lane]))
            r = before * expm1_near(change - shift) / q
            parts[lane] += q * _relative(r)
    return parts.sum()


@kernel
def _any_divergence(wide: Any, base: Any, room: Any) -> Any:
    """The definition, for changes of any size"""
    top_b, top_x, most = np.float64(as_f32(base[0])), np.float64(as_f32(wide[0])), 0.0
    for i in range(len(base)):
        b, x = np.float64(as_f32(base[i])), np.float64(as_f32(wide[i]))
        top_b, top_x = max(top_b, b), max(top_x, x)
        most = most if abs(x - b) <= most else abs(x - b)  # NaN stays
    total_b = total_x = gain = 0.0
    for i in range(len(base)):
        b, x = np.float64(as_f32(base[i])), np.float64(as_f32(wide[i]))
        room[i] = exp(b - top_b)
        total_b += room[i]
        total_x += exp(x - top_x) if most >= 1 else 0.0
        gain += room[i] * expm1(min(1.0, max(-1.0, x - b)))
    shift = log1p(gain / total_b)
    total = 0.0
    for i in range(len(base)):
        b, x = np.float64(as_f32(base[i])), np.float64(as_f32(wide[i]))
        before = room[i] / total_b
        gained = before * expm1(x - b - shift) if most < 1 else exp(x - top_x) / total_x - before
        q = before + FUSION_EPSILON
        r = gained / q
        total += q * (_relative(r) if abs(r) < _NEARLY else (1 + r) * log1p(r) - r)
    return total


@kernel
def _relative(r: Any) -> Any:
    """(1 + r) log(1 + r) - r for |r| < _NEARLY: the sum of (-1)^k r^k / (k (k - 1)) from k = 2 on, to k = 18"""
    p = 1 / 306
    p = 1 / 272 - p * r
    p = 1 / 240 - p * r
    p = 1 / 210 - p * r
    p = 1 / 182 - p * r
    p = 1 / 156 - p * r
    p = 1 / 132 - p * r
    p = 1 / 110 - p * r
    p = 1 / 90 - p * r
    p = 1 / 72 - p * r
    p = 1 / 56 - p * r
    p = 1 / 42 - p * r
    p = 1 / 30 - p * r
    p = 1 / 20 - p * r
    p = 1 / 12 - p * r
    p = 1 / 6 - p * r
    p = 1 / 2 - p * r
    return p * r * r


@kernel
def _importance(raw: Any, divergences: Any, width: int, start: int, out: Any) -> None:
    """raw (2, n) from flat index start, divergences (rows,) -> |d| times that of its row, rounded to float32"""
    first = 0
    while first < raw.shape[1]:
        row = (start + first) // width
        last = min(raw.shape[1], (row + 1) * width - start)
        base, wide, into, by = raw[0, first:last], raw[1, first:last], out[first:last], divergences[row]
        for i in range(len(base)):
            into[i] = np.float32(abs(np.float64(as_f32(wide[i])) - np.float64(as_f32(base[i]))) * by)
        first = last


@kernel
def _choose(raw: Any, least: float, out: Any) -> None:
    """out: the importance, then what it decides on"""
    for i in range(raw.shape[1]):
        out[i] = as_f32(raw[1, i]) if np.float64(out[i]) >= least else as_f32(raw[0, i])
