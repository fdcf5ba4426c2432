"""Textbook building blocks of the methods in torch: what the fused kernels are compared with, and what a GPU runs.

Tensors are float32; sums over models are float64, one model at a time, as in the kernels, and rounded by the engine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge.kernels.selection import Threshold, count_kept

_TINY_WEIGHT = 1e-8
_M32 = 0xFFFFFFFF


def weighted_sum(rows: Tensor, factors: tuple[float, ...]) -> Tensor:
    """rows (model, *shape) float32 -> sum_i factor_i row_i (*shape) float64"""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for row, factor in zip(rows, factors, strict=True):
        total += row.to(torch.float64) * factor
    return total


def divisor(weight: tuple[float, ...], normalize: bool) -> float:
    """What `normalize` divides by without election: the sum of weights, unless it is next to nothing"""
    total = math.fsum(weight)
    return total if normalize and abs(total) >= _TINY_WEIGHT else 1.0


def elect_and_sum(
    kept: Tensor, weight: tuple[float, ...], factors: tuple[float, ...], normalize: bool, lambda_: float
) -> Tensor:
    """kept (model, *shape) float32 -> lambda * sum of the f_i d_i that agree with sign(sum_i f_i d_i), 0 counting as +

    Args:
        weight: see merge.kernels.weights.
        factors: the weights, times what makes up for dropped entries.
        normalize: divide by the weights of those that agree.
    """
    positive = weighted_sum(kept, factors) >= 0
    total = torch.zeros(kept.shape[1:], dtype=torch.float64, device=kept.device)
    weights = torch.zeros_like(total)
    for delta, w, factor in zip(kept, weight, factors, strict=True):
        value = delta.to(torch.float64) * factor
        agrees = ((value > 0) == positive) & (value != 0)
        total += torch.where(agrees, value, 0.0)
        weights += agrees.to(torch.float64) * w
    if normalize:
        return lambda_ * (total / torch.where(weights == 0, 1.0, weights))
    return lambda_ * total


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Zero but for the k = max(1, floor(density n)) entries of largest magnitude; ties: lowest flat index first"""
    keep = count_kept(density, delta.numel())
    kept = torch.zeros_like(delta).view(-1)
    order = torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices[:keep]
    kept[order] = delta.reshape(-1)[order]
    return kept.view(delta.shape)


def keep_above(delta: Tensor, threshold: Threshold) -> Tensor:
    """Zero but for the entries that a threshold over the whole model keeps"""
    bits = delta.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF
    index = torch.arange(delta.numel(), device=delta.device).view(delta.shape)
    least = torch.where(index < threshold.cut, threshold.bits, threshold.bits + 1)
    return torch.where(bits >= least, delta, torch.zeros_like(delta))


def l1_factors(weight: tuple[float, ...], deltas: Tensor, kept: Tensor) -> tuple[float, ...]:
    """weight * ‖d‖₁ / ‖what is kept of d‖₁ for each model; the weight alone where nothing is kept"""
    factors = []
    for w, delta, rest in zip(weight, deltas, kept, strict=True):
        left = float(rest.abs().sum(dtype=torch.float64))
        factors.append(w * (float(delta.abs().sum(dtype=torch.float64)) / left) if left > 0 else w)
    return tuple(factors)


def drop_at_random(
    deltas: Tensor, weight: tuple[float, ...], density: tuple[float, ...], keys: tuple[int, ...], rescale: bool | str
) -> tuple[Tensor, tuple[float, ...]]:
    """(model, *shape) -> the same with each entry kept with its model's density, and the factors for what is left"""
    masks = [random_mask(delta, share, key) for delta, share, key in zip(deltas, density, keys, strict=True)]
    kept = torch.where(torch.stack(masks), deltas, 0.0)
    if rescale == "l1":
        return kept, l1_factors(weight, deltas, kept)
    if rescale:
        return kept, tuple(w / share if share > 0 else 0.0 for w, share in zip(weight, density, strict=True))
    return kept, weight


def random_mask(like: Tensor, density: float, key: int) -> Tensor:
    """Bernoulli(density) by element index and key; the same bits as merge.kernels.task_vectors.stays"""
    if density <= 0:
        return torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    first, second = key & _M32, key >> 32
    x = ((index & _M32) * 0x9E3779B1 + first) & _M32
    x = (_mix32(x) + second + (index >> 32) * 0x85EBCA6B) & _M32
    most = min(max(round(density * 2**32) - 1, 0), _M32)
    return (_mix32(x) <= most).view(like.shape)


def _mix32(x: Tensor) -> Tensor:
    """See merge.kernels.bits.mix32; in int64, whose product wraps modulo 2^64 and is cut to 32 bits"""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & _M32
    return x ^ (x >> 15)
