"""Fused kernels of the task-arithmetic family, with sign election and without.

Row 0 of a block is the base; task vectors are formed while reading. Each kernel exists once for any number of models:
the weights come as a tuple, whose length the compiler knows and unrolls.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32, Numbers, Raw
from merge.kernels.bits import as_f32, kernel, where
from merge.kernels.protocol import Block, Combine, FusedTensor
from merge.kernels.selection import Threshold, count_kept, largest
from merge.kernels.sparsify import (
    Band,
    Limits,
    Mask,
    Sparsifier,
    band_pieces,
    columns,
    dropped,
    dropped_by_rank,
    inliers,
    is_within,
    l1_factors,
    mask_pieces,
    random_masks,
    stays,
    trimmed,
    within,
)
from merge.kernels.weights import Election, divisor, election


def task_arithmetic(
    tensor: FusedTensor, *, weight: Numbers, normalize: bool = False, lambda_: float = 1.0, **unused: object
) -> Combine:
    factors = _scaled(weight, lambda_ / divisor(weight, normalize))

    def combine(block: Block, out: F32) -> None:
        _add_deltas(block.raw, factors, out)

    return combine


def ties(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool | str = False,
    consensus: str = "sum",
    divide_by: str = "weights",
    merge_func: str = "normalize",
    _threshold: tuple[Threshold, ...] | None = None,
    **unused: object,
) -> Combine:
    thresholds = list(_threshold or largest(tensor, [count_kept(share, tensor.size) for share in density]))
    bands = within(thresholds)
    factors = l1_factors(tensor, weight, trimmed(bands)) if rescale else weight
    return _elect_within(bands, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))


def breadcrumbs(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    gamma: Numbers,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = False,
    **unused: object,
) -> Combine:
    bands = inliers(tensor, density, gamma)
    factors = l1_factors(tensor, weight, trimmed(bands)) if rescale else weight
    scale = lambda_ / divisor(weight, normalize)

    def combine(block: Block, out: F32) -> None:
        for start, stop, limits in band_pieces(block, bands):
            _trim_add(columns(block, start, stop), factors, limits, scale, out[start:])

    return combine


def breadcrumbs_ties(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    gamma: Numbers,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = False,
    consensus: str = "sum",
    divide_by: str = "weights",
    merge_func: str = "normalize",
    **unused: object,
) -> Combine:
    bands = inliers(tensor, density, gamma)
    factors = l1_factors(tensor, weight, trimmed(bands)) if rescale else weight
    return _elect_within(bands, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))


def dare_linear(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    masks = random_masks(_keys, density)
    factors = _scaled(_dare_factors(tensor, weight, density, rescale, masks), lambda_ / divisor(weight, normalize))

    def combine(block: Block, out: F32) -> None:
        for start, stop, here in mask_pieces(block, masks):
            _drop_add(columns(block, start, stop), factors, here, block.start + start, out[start:])

    return combine


def dare_ties(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    consensus: str = "sum",
    divide_by: str = "weights",
    merge_func: str = "normalize",
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    masks = random_masks(_keys, density)
    factors = _dare_factors(tensor, weight, density, rescale, masks)
    vote = election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func)
    if vote.by_count:
        return _elect(dropped(masks), vote)

    def combine(block: Block, out: F32) -> None:
        for start, stop, here in mask_pieces(block, masks):
            raw, first = columns(block, start, stop), block.start + start
            _drop_elect(raw, vote.divisors, vote.factors, here, vote.divide, vote.scale, first, out[start:])

    return combine


def della_linear(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    epsilon: Numbers,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    sparsify = dropped_by_rank(tensor, _keys, density, epsilon, rescale is True)
    factors = l1_factors(tensor, weight, sparsify) if rescale == "l1" else weight
    return _add(sparsify, factors, lambda_ / divisor(weight, normalize))


def della(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    density: Numbers,
    epsilon: Numbers,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    consensus: str = "sum",
    divide_by: str = "weights",
    merge_func: str = "normalize",
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    sparsify = dropped_by_rank(tensor, _keys, density, epsilon, rescale is True)
    factors = l1_factors(tensor, weight, sparsify) if rescale == "l1" else weight
    return _elect(sparsify, election(weight, factors, normalize, lambda_, consensus, divide_by, merge_func))


def consensus_ta(
    tensor: FusedTensor,
    *,
    weight: Numbers,
    mask_lambda: Numbers,
    k: int = 2,
    lambda_: float = 1.0,
    **unused: object,
) -> Combine:
    def combine(block: Block, out: F32) -> None:
        _add_agreed(block.raw, weight, mask_lambda, k, lambda_, out)

    return combine


def _elect_within(bands: list[Band], vote: Election) -> Combine:
    if vote.by_count:
        return _elect(trimmed(bands), vote)

    def combine(block: Block, out: F32) -> None:
        for start, stop, limits in band_pieces(block, bands):
            raw = columns(block, start, stop)
            _trim_elect(raw, vote.divisors, vote.factors, limits, vote.divide, vote.scale, out[start:])

    return combine


def _add(sparsify: Sparsifier, factors: Numbers, scale: float) -> Combine:
    def combine(block: Block, out: F32) -> None:
        _add_sparse(block.raw, sparsify(block), factors, scale, out)

    return combine


def _elect(sparsify: Sparsifier, vote: Election) -> Combine:
    def combine(block: Block, out: F32) -> None:
        sparse = sparsify(block)
        _elect_sparse(block.raw, sparse, vote.divisors, vote.factors, vote.by_count, vote.divide, vote.scale, out)

    return combine


def _scaled(weight: Numbers, factor: float) -> Numbers:
    return tuple(w * factor for w in weight)


def _dare_factors(tensor: FusedTensor, weight: Numbers, density: Numbers, rescale: bool | str, masks: Mask) -> Numbers:
    """What a surviving entry is multiplied with: its weight, and what makes up for the dropped ones."""
    weight = tuple(w if share > 0 else 0.0 for w, share in zip(weight, density, strict=True))
    if rescale == "l1":
        return l1_factors(tensor, weight, dropped(masks))
    if rescale:
        return tuple(w / share if share > 0 else 0.0 for w, share in zip(weight, density, strict=True))
    return weight


@kernel
def _add_deltas(raw: Raw, factors: Numbers, out: F32) -> None:
    """raw (1 + model, n), factors a tuple of float64 -> out = base + sum of factor * delta"""
    for i in range(out.shape[0]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(factors)):
            total += factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base)
        out[i] = np.float32(base + total)


@kernel
def _trim_elect(
    raw: Raw, weights: Numbers, factors: Numbers, limits: Limits, normalize: bool, scale: float, out: F32
) -> None:
    """raw (1 + model, n): trims by magnitude bits, elects signs, averages what agrees; out (>= n,) float32

    Two loops over the models with selects and no branches: twice the arithmetic, and all of it in vector registers.
    """
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(weights)):
            delta = as_f32(raw[m + 1, i]) - base
            total += factors[m] * np.float64(where(is_within(delta, limits[m][0], limits[m][1]), delta, np.float32(0)))
        sign = where(total >= 0.0, 1.0, -1.0)
        agreed = 0.0
        divisor = 0.0
        for m in range(len(weights)):
            delta = as_f32(raw[m + 1, i]) - base
            stays_ = is_within(delta, limits[m][0], limits[m][1])
            value = sign * (factors[m] * np.float64(where(stays_, delta, np.float32(0))))
            agreed += where(value > 0.0, value, 0.0)
            divisor += where(value > 0.0, weights[m], 0.0)
        if normalize:
            agreed /= where(divisor != 0.0, divisor, 1.0)
        out[i] = np.float32(np.float64(base) + scale * (sign * agreed))


@kernel
def _trim_add(raw: Raw, factors: Numbers, limits: Limits, scale: float, out: F32) -> None:
    """raw (1 + model, n) -> out = base + scale * sum of factor * delta over what lies within the limits"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(factors)):
            delta = as_f32(raw[m + 1, i]) - base
            total += factors[m] * np.float64(where(is_within(delta, limits[m][0], limits[m][1]), delta, np.float32(0)))
        out[i] = np.float32(np.float64(base) + scale * total)


@kernel
def _drop_add(raw: Raw, factors: Numbers, masks: Mask, start: int, out: F32) -> None:
    """raw (1 + model, n) -> out = base + sum of factor * delta over what the random masks keep"""
    for i in range(raw.shape[1]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(factors)):
            delta = factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base)
            total += where(stays(start + i, masks[m][0], masks[m][1], masks[m][2]), delta, 0.0)
        out[i] = np.float32(base + total)


@kernel
def _drop_elect(
    raw: Raw, weights: Numbers, factors: Numbers, masks: Mask, normalize: bool, scale: float, start: int, out: F32
) -> None:
    """raw (1 + model, n): drops at random, elects signs, adds what agrees (divided by its weights if normalize)"""
    for i in range(raw.shape[1]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(weights)):
            kept = stays(start + i, masks[m][0], masks[m][1], masks[m][2])
            total += factors[m] * where(kept, np.float64(as_f32(raw[m + 1, i])) - base, 0.0)
        sign = where(total >= 0.0, 1.0, -1.0)
        agreed = 0.0
        divisor = 0.0
        for m in range(len(weights)):
            kept = stays(start + i, masks[m][0], masks[m][1], masks[m][2])
            value = sign * (factors[m] * where(kept, np.float64(as_f32(raw[m + 1, i])) - base, 0.0))
            agreed += where(value > 0.0, value, 0.0)
            divisor += where(value > 0.0, weights[m], 0.0)
        if normalize:
            agreed /= where(divisor != 0.0, divisor, 1.0)
        out[i] = np.float32(base + scale * (sign * agreed))


@kernel
def _add_sparse(raw: Raw, sparse: F32, factors: Numbers, scale: float, out: F32) -> None:
    """raw (1 + model, n), sparse (model, n) -> out = base + scale * sum of factor * sparse * delta"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(factors)):
            value = factors[m] * (np.float64(as_f32(raw[m + 1, i]) - base) * np.float64(sparse[m, i]))
            total += where(sparse[m, i] != 0.0, value, 0.0)
        out[i] = np.float32(np.float64(base) + scale * total)


@kernel
def _elect_sparse(
    raw: Raw, sparse: F32, divisors: Numbers, factors: Numbers, by_count: bool, divide: bool, scale: float, out: F32
) -> None:
    """raw (1 + model, n), sparse (model, n): elects signs by sum or by count, adds what agrees, may divide it"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(factors)):
            value: float = factors[m] * (np.float64(as_f32(raw[m + 1, i]) - base) * np.float64(sparse[m, i]))
            value = where(sparse[m, i] != 0.0, value, 0.0)
            if by_count:
                value = where(value > 0.0, 1.0, 0.0) - where(value < 0.0, 1.0, 0.0)
            total += value
        sign = where(total >= 0.0, 1.0, -1.0)
        agreed = 0.0
        divisor = 0.0
        for m in range(len(factors)):
            value = factors[m] * (np.float64(as_f32(raw[m + 1, i]) - base) * np.float64(sparse[m, i]))
            value = where(sparse[m, i] != 0.0, sign * value, 0.0)
            agreed += where(value > 0.0, value, 0.0)
            divisor += where(value > 0.0, divisors[m], 0.0)
        if divide:
            agreed /= where(divisor != 0.0, divisor, 1.0)
        out[i] = np.float32(np.float64(base) + scale * (sign * agreed))


@kernel
def _add_agreed(raw: Raw, weights: Numbers, mask_lambda: Numbers, k: int, scale: float, out: F32) -> None:
    """raw (1 + model, n) -> out = base + the weighted sum of deltas, where it is close to k of them"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(weights)):
            total += weights[m] * np.float64(as_f32(raw[m + 1, i]) - base)
        count = np.int64(0)
        for m in range(len(weights)):
            delta = np.float64(as_f32(raw[m + 1, i]) - base)
            count += abs(delta) >= mask_lambda[m] * abs(total - delta)
        out[i] = np.float32(np.float64(base) + where(count >= k, scale * total, 0.0))
