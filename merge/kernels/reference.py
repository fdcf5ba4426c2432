"""Textbook building blocks of the methods in torch: what the fused kernels are compared with, and what a GPU runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge.kernels.selection import Threshold, count_kept

_TINY_WEIGHT = 1e-8
_M32 = 0xFFFFFFFF


def per_model(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One number a model, shaped to multiply (model, *shape)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def weighted_sum(deltas: Tensor, weight: tuple[float, ...], normalize: bool, scale: float) -> Tensor:
    """deltas (model, *shape) -> scale * sum_i w_i d_i, divided by sum_i w_i if normalize"""
    total = (per_model(weight, deltas) * deltas).sum(dim=0)
    divisor = math.fsum(weight)
    if normalize and abs(divisor) >= _TINY_WEIGHT:
        total = total / divisor
    return scale * total


def elect_and_sum(
    deltas: Tensor, weight: tuple[float, ...], normalize: bool, scale: float, factor: tuple[float, ...] | None = None
) -> Tensor:
    """deltas (model, *shape) -> scale * sum of the w_i d_i that agree with sign(sum_i w_i d_i), zero counting as +"""
    weighted = per_model(factor or weight, deltas) * deltas
    positive = weighted.sum(dim=0) >= 0
    agrees = ((weighted > 0) == positive) & (weighted != 0)
    total = torch.where(agrees, weighted, torch.zeros_like(weighted)).sum(dim=0)
    if normalize:
        divisor = (per_model(weight, deltas) * agrees).sum(dim=0)
        total = total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return scale * total


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


def rescale_l1(kept: Tensor, deltas: Tensor) -> Tensor:
    """(model, *shape) twice -> kept, each model scaled to the L1 norm its delta had"""
    dims = tuple(range(1, deltas.ndim))
    full = deltas.abs().to(torch.float64).sum(dim=dims, keepdim=True)
    left = kept.abs().to(torch.float64).sum(dim=dims, keepdim=True)
    return kept * torch.where(left > 0, full / left, torch.ones_like(left)).to(kept.dtype)


def drop_at_random(deltas: Tensor, density: tuple[float, ...], keys: tuple[int, ...], rescale: bool | str) -> Tensor:
    """(model, *shape) -> each entry kept with its model's density, and what is left rescaled"""
    masks = [random_mask(delta, share, key) for delta, share, key in zip(deltas, density, keys, strict=True)]
    kept = torch.where(torch.stack(masks), deltas, torch.zeros_like(deltas))
    if rescale == "l1":
        return rescale_l1(kept, deltas)
    if rescale:
        return kept * per_model(tuple(1 / share if share > 0 else 0.0 for share in density), deltas)
    return kept


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
