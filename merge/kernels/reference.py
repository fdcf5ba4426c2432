"""Textbook definitions of the methods' building blocks in torch: references for the kernels, and run on GPUs.

Tensors are float32; sums over models are float64, one model at a time, as in the kernels, and rounded by the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge.kernels.selection import Threshold, count_kept, count_outliers
from merge.kernels.weights import Election

_M32 = 0xFFFFFFFF


def weighted_sum(rows: Tensor, factors: tuple[float, ...]) -> Tensor:
    """rows (model, *shape) float32 -> sum_i factor_i row_i (*shape) float64"""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for row, factor in zip(rows, factors, strict=True):
        total += row.to(torch.float64) * factor
    return total


def elect_and_sum(kept: Tensor, vote: Election) -> Tensor:
    """kept (model, *shape) -> scale * sum of the f_i d_i that agree with the elected sign; no votes or a draw: +"""
    values = [delta.to(torch.float64) * factor for delta, factor in zip(kept, vote.factors, strict=True)]
    total = torch.zeros(kept.shape[1:], dtype=torch.float64, device=kept.device)
    for value in values:
        total += value.sign() if vote.by_count else value
    positive = total >= 0
    agreed, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for value, share in zip(values, vote.divisors, strict=True):
        agrees = ((value > 0) == positive) & (value != 0)
        agreed += torch.where(agrees, value, 0.0)
        divisor += agrees.to(torch.float64) * share
    if vote.divide:
        agreed = agreed / torch.where(divisor == 0, 1.0, divisor)
    return vote.scale * agreed


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Zero but for the k = max(1, floor(density n)) entries of largest magnitude; ties: lowest flat index first"""
    keep = count_kept(density, delta.numel())
    kept = torch.zeros_like(delta).view(-1)
    order = torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices[:keep]
    kept[order] = delta.reshape(-1)[order]
    return kept.view(delta.shape)


def keep_inliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Zero but for the k largest after the floor(gamma n) largest; ties: lowest flat index counts as larger"""
    top = count_outliers(gamma, density, delta.numel())
    kept = torch.zeros_like(delta).view(-1)
    order = torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices
    order = order[top : top + count_kept(density, delta.numel())]
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


def drop_by_rank(
    deltas: Tensor,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    keys: tuple[int, ...],
    rescale: bool | str,
) -> tuple[Tensor, tuple[float, ...]]:
    """(model, *shape) -> the same with each entry kept by its rank's probability p_i; / p_i if rescale is true"""
    kept = torch.zeros(deltas.shape, dtype=torch.float64, device=deltas.device)
    for row, delta, share, spread, key in zip(kept, deltas, density, epsilon, keys, strict=True):
        if share >= 1:
            row.copy_(delta)
        elif share > 0:
            p = rank_probabilities(delta, share, spread)
            factor = (1 / p).to(torch.float32).to(torch.float64) if rescale is True else 1.0
            row.copy_(torch.where(random_mask(delta, p, key), delta.to(torch.float64) * factor, 0.0))
    return kept, l1_factors(weight, deltas, kept) if rescale == "l1" else weight


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for a row's smallest magnitude to density + epsilon; of equal ones the first is smaller"""
    rows = delta.abs().reshape(-1, max(1, delta.shape[-1] if delta.dim() else 1))
    length = rows.shape[1]
    if length == 1:
        return torch.full(delta.shape, density, dtype=torch.float64, device=delta.device)
    ranks = torch.sort(torch.sort(rows, dim=1, stable=True).indices, dim=1).indices.to(torch.float64)
    return ((density - epsilon) + ranks * (2 * epsilon / (length - 1))).view(delta.shape)


def random_mask(like: Tensor, density: float | Tensor, key: int) -> Tensor:
    """Bernoulli(density) by element index and key; equals merge.kernels.sparsify.stays bit for bit"""
    share = torch.as_tensor(density, dtype=torch.float64, device=like.device)
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    first, second = key & _M32, key >> 32
    x = ((index & _M32) * 0x9E3779B1 + first) & _M32
    x = (_mix32(x) + second + (index >> 32) * 0x85EBCA6B) & _M32
    most = (torch.round(share * 2.0**32) - 1).clamp(0, _M32).to(torch.int64)
    return (_mix32(x).view(like.shape) <= most) & (share > 0)


def _mix32(x: Tensor) -> Tensor:
    """See merge.kernels.bits.mix32; in int64, whose product wraps modulo 2^64 and is cut to 32 bits"""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & _M32
    return x ^ (x >> 15)
