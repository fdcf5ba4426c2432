"""Fused kernel of arcee_fusion: the divergence of each row, quantiles of what follows from it, then a choice by entry.

Where changes are small, as fine-tunes are, exponentials and logarithms are plain polynomials: they run in vector
registers, 3 ns an entry in place of 30.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32, F64, Raw
from merge.kernels.bits import as_f32, kernel, where
from merge.kernels.coefficients import FUSION_EPSILON, FUSION_SHARES, fusion_threshold
from merge.kernels.computed import Computed
from merge.kernels.elementwise import weighted_sum
from merge.kernels.encode import LANES
from merge.kernels.functions import NEAR, exp, exp_down, expm1, expm1_near, log1p
from merge.kernels.protocol import Block, Combine, FusedTensor
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

    def combine(block: Block, out: F32) -> None:
        _importance(block.raw, divergences, width, block.start, out)
        _choose(block.raw, least, out)

    return combine


def _divergences(tensor: FusedTensor, width: int) -> F64:
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
def _row_divergences(raw: Raw, width: int, out: F64) -> None:
    room = np.empty(width, np.float64)
    for row in range(raw.shape[1] // width):
        span = slice(row * width, (row + 1) * width)
        out[row] = _divergence(raw[1, span], raw[0, span], room)


@kernel
def _divergence(wide: Raw, base: Raw, room: F64) -> float:
    """KL(softmax wide || softmax base), see merge.methods.arcee_fusion.divergence; room (n,) float64 is written"""
    lanes = np.zeros((3, LANES), np.float64)
    lanes[:2] = -np.inf
    top_b, top_x, most = lanes[0], lanes[1], lanes[2]
    for start in range(0, len(base), LANES):
        b, x = base[start : start + LANES], wide[start : start + LANES]
        for lane in range(len(b)):
            before, after = np.float64(as_f32(b[lane])), np.float64(as_f32(x[lane]))
            change = abs(after - before)
            top_b[lane] = where(before > top_b[lane], before, top_b[lane])
            top_x[lane] = where(after > top_x[lane], after, top_x[lane])
            # NaN stays, which it is where neither number is finite, or one is NaN
            most[lane] = where((change <= most[lane]) | (most[lane] != most[lane]), most[lane], change)
    largest = most.max()
    if largest < _SMALL:
        return _small_divergence(wide, base, top_b.max(), room)
    return _any_divergence(wide, base, top_b.max(), top_x.max(), largest, room)


@kernel
def _small_divergence(wide: Raw, base: Raw, top: float, room: F64) -> float:
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
    return float(parts.sum())


@kernel
def _any_divergence(wide: Raw, base: Raw, top_b: float, top_x: float, most: float, room: F64) -> float:
    """The definition, for changes of any size; terms are computed a few at a time, and added in order"""
    lanes = np.zeros((2, LANES), np.float64)
    first, second = lanes[0], lanes[1]
    total_b = total_x = gain = 0.0
    for start in range(0, len(base), LANES):
        b, x, e = base[start : start + LANES], wide[start : start + LANES], room[start : start + LANES]
        for lane in range(len(b)):
            before, after = np.float64(as_f32(b[lane])), np.float64(as_f32(x[lane]))
            e[lane] = exp(before - top_b)
            first[lane] = exp(after - top_x)
            second[lane] = e[lane] * expm1(min(1.0, max(-1.0, after - before)))
        for lane in range(len(b)):
            total_b += e[lane]
            total_x += first[lane]
            gain += second[lane]
    shift = log1p(gain / total_b)
    total = 0.0
    for start in range(0, len(base), LANES):
        b, x, e = base[start : start + LANES], wide[start : start + LANES], room[start : start + LANES]
        for lane in range(len(b)):
            value, after = np.float64(as_f32(b[lane])), np.float64(as_f32(x[lane]))
            before = e[lane] / total_b
            small, large = before * expm1(after - value - shift), exp(after - top_x) / total_x - before
            q = before + FUSION_EPSILON
            r = where(most < 1, small, large) / q
            first[lane] = q * where(abs(r) < _NEARLY, _relative(r), (1 + r) * log1p(r) - r)
        for lane in range(len(b)):
            total += first[lane]
    return total


@kernel
def _relative(r: float) -> float:
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
def _importance(raw: Raw, divergences: F64, width: int, start: int, out: F32) -> None:
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
def _choose(raw: Raw, least: float, out: F32) -> None:
    """out: the importance, then what it decides on"""
    for i in range(raw.shape[1]):
        out[i] = where(np.float64(out[i]) >= least, as_f32(raw[1, i]), as_f32(raw[0, i]))
