"""Fused kernels of the task-arithmetic family: task_arithmetic, ties, dare_linear, dare_ties.

Row 0 of a block is the base; task vectors are formed while reading. Each kernel exists once for any number of models:
the weights come as a tuple, whose length the compiler knows and unrolls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from merge.kernels.bits import add32, as_f32, counter32, kernel, magnitude_bits, mix32
from merge.kernels.protocol import Block, Combine, Floats, FusedTensor
from merge.kernels.selection import Threshold, count_kept, largest
from merge.kernels.weights import whole

_TINY_WEIGHT = 1e-8  # a sum of weights below this does not normalise
_COUNTER = 1 << 32  # the random counter's low half; blocks are cut there


def task_arithmetic(
    tensor: FusedTensor, *, weight: tuple[float, ...], normalize: bool = False, lambda_: float = 1.0, **unused: object
) -> Combine:
    factors = _scaled(weight, lambda_ / _divisor(weight, normalize))

    def combine(block: Block, out: Floats) -> None:
        _add_deltas(block.raw, factors, out)

    return combine


def ties(
    tensor: FusedTensor,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool | str = False,
    _threshold: tuple[Threshold, ...] | None = None,
    **unused: object,
) -> Combine:
    thresholds = list(_threshold or largest(tensor, [count_kept(share, tensor.size) for share in density]))
    weights, scale = whole(weight)
    factors = weights
    if rescale:
        factors = _l1_factors(tensor, weights, lambda block: _pieces_of_trimmed(block, thresholds), trimmed_sums)
    last = lambda_ if normalize else lambda_ / scale

    def combine(block: Block, out: Floats) -> None:
        for piece, bits in _pieces_of_trimmed(block, thresholds):
            _trim_elect(piece.raw, weights, factors, bits, normalize, last, out[piece.start - block.start :])

    return combine


def dare_linear(
    tensor: FusedTensor,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    masks = random_masks(_keys, density)
    factors = _scaled(_kept_factors(tensor, weight, density, rescale, masks), lambda_ / _divisor(weight, normalize))

    def combine(block: Block, out: Floats) -> None:
        for piece, mask in _pieces_of_masked(block, masks):
            _drop_add(piece.raw, factors, mask, piece.start, out[piece.start - block.start :])

    return combine


def dare_ties(
    tensor: FusedTensor,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool | str = True,
    _keys: tuple[int, ...],
    **unused: object,
) -> Combine:
    masks = random_masks(_keys, density)
    both, scale = whole(weight + _kept_factors(tensor, weight, density, rescale, masks))
    weights, factors = both[: len(weight)], both[len(weight) :]
    last = lambda_ if normalize else lambda_ / scale

    def combine(block: Block, out: Floats) -> None:
        for piece, mask in _pieces_of_masked(block, masks):
            into = out[piece.start - block.start :]
            _drop_elect(piece.raw, weights, factors, mask, normalize, last, piece.start, into)

    return combine


def _divisor(weight: tuple[float, ...], normalize: bool) -> float:
    total = math.fsum(weight)
    return total if normalize and abs(total) >= _TINY_WEIGHT else 1.0


def _scaled(weight: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(w * factor for w in weight)


# A mask as kernels take it: (key, key, greatest random number that keeps) for each model, as one tuple of uint32.
Mask = tuple[Any, ...]


def random_masks(keys: tuple[int, ...], density: tuple[float, ...]) -> Mask:
    """Bernoulli(density): an element stays if its 32 random bits do not exceed density * 2^32 - 1."""
    words = []
    for key, share in zip(keys, density, strict=True):
        most = min(max(round(share * 2**32) - 1, 0), 2**32 - 1)
        words.append((np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), np.uint32(most)))
    return tuple(words)


def _kept_factors(
    tensor: FusedTensor, weight: tuple[float, ...], density: tuple[float, ...], rescale: bool | str, masks: Mask
) -> tuple[float, ...]:
    """What a surviving entry is multiplied with: its weight, and what makes up for the dropped ones."""
    weight = tuple(w if share > 0 else 0.0 for w, share in zip(weight, density, strict=True))
    if rescale == "l1":
        return _l1_factors(tensor, weight, lambda block: _pieces_of_masked(block, masks), masked_sums)
    if rescale:
        return tuple(w / share if share > 0 else 0.0 for w, share in zip(weight, density, strict=True))
    return weight


def _l1_factors(tensor: FusedTensor, weight: tuple[float, ...], pieces: Any, sums: Any) -> tuple[float, ...]:
    """weight * ‖d‖₁ / ‖what is kept of d‖₁ for each model; the weight alone where nothing is kept"""
    n_models = len(weight)

    def chunk_sums(block: Block) -> Any:
        total = np.zeros((n_models, 2))
        for piece, mask in pieces(block):
            sums(piece.raw, mask, piece.start, total)
        return total

    if tensor.size == 0:
        return weight
    sums_of_chunks = np.array(tensor.map_chunks(chunk_sums))  # (chunk, model, 2)
    totals = [[math.fsum(sums_of_chunks[:, m, k]) for k in (0, 1)] for m in range(n_models)]
    return tuple(w * (all_ / kept) if kept > 0 else w for w, (all_, kept) in zip(weight, totals, strict=True))


def _pieces(block: Block, cuts: list[int]) -> Iterator[Block]:
    """The block, cut at those flat indices that lie in it."""
    end = block.start + block.raw.shape[1]
    edges = [block.start, *sorted({cut for cut in cuts if block.start < cut < end}), end]
    for start, stop in itertools.pairwise(edges):
        # Few blocks are cut; a copy keeps them of the layout that the kernels are compiled for.
        yield Block(start, np.ascontiguousarray(block.raw[:, start - block.start : stop - block.start]))


def _pieces_of_trimmed(block: Block, thresholds: list[Threshold]) -> Iterator[tuple[Block, Any]]:
    for piece in _pieces(block, [threshold.cut for threshold in thresholds]):
        yield piece, tuple(np.uint32(threshold.at(piece.start)) for threshold in thresholds)


def _pieces_of_masked(block: Block, masks: Mask) -> Iterator[tuple[Block, Mask]]:
    end = block.start + block.raw.shape[1]
    for piece in _pieces(block, list(range(_COUNTER, end, _COUNTER))):
        high = (piece.start >> 32) * 0x85EBCA6B  # past 2^32 elements the second key moves on
        yield piece, tuple((a, np.uint32((int(b) + high) & 0xFFFFFFFF), most) for a, b, most in masks)


@kernel
def _add_deltas(raw: Any, factors: Any, out: Any) -> None:
    """raw (1 + model, n), factors a tuple of float64 -> out = base + sum of factor * delta"""
    for i in range(out.shape[0]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(factors)):
            total += factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base)
        out[i] = np.float32(base + total)


@kernel
def _trim_elect(raw: Any, weights: Any, factors: Any, least: Any, normalize: bool, scale: float, out: Any) -> None:
    """raw (1 + model, n): trims by least magnitude bits, elects signs, averages what agrees; out (>= n,) float32

    Two loops over the models with selects and no branches: twice the arithmetic, and all of it in vector registers.
    """
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(weights)):
            delta = as_f32(raw[m + 1, i]) - base
            total += factors[m] * np.float64(delta if magnitude_bits(delta) >= least[m] else np.float32(0))
        sign = 1.0 if total >= 0.0 else -1.0
        agreed = 0.0
        divisor = 0.0
        for m in range(len(weights)):
            delta = as_f32(raw[m + 1, i]) - base
            value = sign * (factors[m] * np.float64(delta if magnitude_bits(delta) >= least[m] else np.float32(0)))
            agreed += value if value > 0.0 else 0.0
            divisor += weights[m] if value > 0.0 else 0.0
        if normalize:
            agreed /= divisor if divisor != 0.0 else 1.0
        out[i] = np.float32(np.float64(base) + scale * (sign * agreed))


@kernel
def stays(index: Any, key: Any, other_key: Any, most: Any) -> Any:
    """Whether a random mask keeps an element: a function of its flat index and its model's key alone."""
    return mix32(add32(mix32(counter32(index, key)), other_key)) <= most


@kernel
def _drop_add(raw: Any, factors: Any, masks: Any, start: int, out: Any) -> None:
    """raw (1 + model, n) -> out = base + sum of factor * delta over what the random masks keep"""
    for i in range(raw.shape[1]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(factors)):
            delta = factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base)
            total += delta if stays(start + i, masks[m][0], masks[m][1], masks[m][2]) else 0.0
        out[i] = np.float32(base + total)


@kernel
def _drop_elect(
    raw: Any, weights: Any, factors: Any, masks: Any, normalize: bool, scale: float, start: int, out: Any
) -> None:
    """raw (1 + model, n): drops at random, elects signs, adds what agrees (divided by its weights if normalize)"""
    for i in range(raw.shape[1]):
        base = np.float64(as_f32(raw[0, i]))
        total = 0.0
        for m in range(len(weights)):
            kept = stays(start + i, masks[m][0], masks[m][1], masks[m][2])
            total += factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base if kept else 0.0)
        sign = 1.0 if total >= 0.0 else -1.0
        agreed = 0.0
        divisor = 0.0
        for m in range(len(weights)):
            kept = stays(start + i, masks[m][0], masks[m][1], masks[m][2])
            value = sign * (factors[m] * (np.float64(as_f32(raw[m + 1, i])) - base if kept else 0.0))
            agreed += value if value > 0.0 else 0.0
            divisor += weights[m] if value > 0.0 else 0.0
        if normalize:
            agreed /= divisor if divisor != 0.0 else 1.0
        out[i] = np.float32(base + scale * (sign * agreed))


@kernel
def trimmed_sums(raw: Any, least: Any, start: int, totals: Any) -> None:
    """Adds ‖d‖₁ and ‖trimmed d‖₁ of each model to totals (model, 2) float64."""
    for m in range(len(least)):
        for i in range(raw.shape[1]):
            delta = as_f32(raw[m + 1, i]) - as_f32(raw[0, i])
            size = abs(np.float64(delta))
            totals[m, 0] += size
            totals[m, 1] += size if magnitude_bits(delta) >= least[m] else 0.0


@kernel
def masked_sums(raw: Any, masks: Any, start: int, totals: Any) -> None:
    """Adds ‖d‖₁ and ‖randomly masked d‖₁ of each model to totals (model, 2) float64."""
    for m in range(len(masks)):
        for i in range(raw.shape[1]):
            size = abs(np.float64(as_f32(raw[m + 1, i]) - as_f32(raw[0, i])))
            totals[m, 0] += size
            totals[m, 1] += size if stays(start + i, masks[m][0], masks[m][1], masks[m][2]) else 0.0
