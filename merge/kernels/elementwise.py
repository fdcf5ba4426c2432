"""Fused kernels of the methods that weigh whole tensors: linear, passthrough, slerp.

A fused method is a function of (tensor, parameters). It may look at the tensor in passes (`tensor.sum_chunks`), and
returns what combines one block: `combine(block, out)` with block.raw (source, n) as stored, out (n,) float32.
"""

from __future__ import annotations

import math

import numpy as np

from merge.arrays import F32, F64, Numbers, Raw
from merge.kernels.bits import as_f32, kernel
from merge.kernels.coefficients import slerp_coefficients
from merge.kernels.encode import LANES
from merge.kernels.protocol import Block, Combine, FusedTensor
from merge.kernels.weights import whole


def linear(tensor: FusedTensor, *, weight: Numbers, normalize: bool = True) -> Combine:
    weights, scale = whole(weight)  # whole multiples: what is zero in decimals comes out as zero
    return _weighted(weights, 1.0 / (math.fsum(weights) if normalize else scale))


def passthrough(tensor: FusedTensor, *, scale: tuple[float | None, ...] | None = None) -> Combine:
    factor = scale[0] if scale else None
    return _weighted((1.0 if factor is None else factor,))


def slerp(tensor: FusedTensor, *, t: float) -> Combine:
    square_a, square_b, dot = tensor.sum_chunks(pair_sums, 3)
    return _weighted(slerp_coefficients(square_a, square_b, dot, t))


def _weighted(weights: Numbers, scale: float = 1.0) -> Combine:
    def combine(block: Block, out: F32) -> None:
        weighted_sum(block.raw, weights, scale, out)

    return combine


@kernel
def weighted_sum(raw: Raw, weights: Numbers, scale: float, out: F32) -> None:
    """raw (model, n), weights a tuple of float64 -> out (n,) float32; added in float64, as wide as memory is fast"""
    for i in range(out.shape[0]):
        total = weights[0] * np.float64(as_f32(raw[0, i]))
        for m in range(1, len(weights)):
            total += weights[m] * np.float64(as_f32(raw[m, i]))
        out[i] = np.float32(total * scale)


@kernel
def pair_sums(raw: Raw, out: F64) -> None:
    """raw (2, n) -> out (3,) float64: squared norms of both and their dot product"""
    lanes = np.zeros((3, LANES), np.float64)
    aa, bb, ab = lanes[0], lanes[1], lanes[2]
    for start in range(0, raw.shape[1], LANES):
        first, second = raw[0, start : start + LANES], raw[1, start : start + LANES]
        for lane in range(len(first)):
            a, b = np.float64(as_f32(first[lane])), np.float64(as_f32(second[lane]))
            aa[lane] += a * a
            bb[lane] += b * b
            ab[lane] += a * b
    for k in range(3):
        out[k] = lanes[k].sum()


@kernel
def difference_sums(raw: Raw, row: int) -> tuple[float, float]:
    """raw (source, n) -> squared norms of row 0 and of the difference of `row` to it; float64"""
    lanes = np.zeros((2, LANES), np.float64)
    bases, deltas = lanes[0], lanes[1]
    for start in range(0, raw.shape[1], LANES):
        first, second = raw[0, start : start + LANES], raw[row, start : start + LANES]
        for lane in range(len(first)):
            base = np.float64(as_f32(first[lane]))
            delta = np.float64(as_f32(second[lane])) - base
            bases[lane] += base * base
            deltas[lane] += delta * delta
    return lanes[0].sum(), lanes[1].sum()
