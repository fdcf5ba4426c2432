"""Sparsifies task vectors: computes one factor for each entry, 0 for dropped entries.

A sparsifier is made once for a tensor and then called for every block. Methods whose default must be as fast as
memory (ties, DARE) test thresholds and random numbers in their own kernels instead; all else combines these factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from merge.arrays import F32, F64, U32, Array, Raw
from merge.kernels.bits import Int, Truth, add32, as_f32, counter32, kernel, magnitude_bits, mix32, sub32, where
from merge.kernels.encode import LANES
from merge.kernels.protocol import Block, FusedTensor
from merge.kernels.ranks import sorted_rows
from merge.kernels.scratch import Scratch
from merge.kernels.selection import KEEP_NONE, Threshold, count_kept, count_outliers, largest

_COUNTER = 1 << 32  # the random counter's low half; blocks are cut there
_HIGH = 0x85EBCA6B  # what the second key moves on by with the counter's high half
_SORTED = 1 << 15  # elements whose order is found at once: their keys stay in cache

# Block -> (model, n) float32, valid until the same thread's next call.
Sparsifier = Callable[[Block], F32]
# What of one model stays: entries that the first threshold keeps and the second does not.
Band = tuple[Threshold, Threshold]
# The same as kernels take it: (least magnitude bits, how many values from there) for each model, as uint32.
Limits = tuple[tuple[np.uint32, np.uint32], ...]
# A random mask as kernels take it: (key, key, greatest random number that keeps) for each model, as uint32.
Mask = tuple[tuple[np.uint32, np.uint32, np.uint32], ...]


_scratch = Scratch()


def _factors(n_models: int, block: Block) -> F32:
    n = block.raw.shape[1]
    return _scratch.array("factors", n_models * n, np.float32).reshape(n_models, n)


def edges(block: Block, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) within the block of its pieces between those flat indices."""
    n = block.raw.shape[1]
    inside = sorted({cut - block.start for cut in cuts if 0 < cut - block.start < n})
    yield from itertools.pairwise([0, *inside, n])


def columns(block: Block, start: int, stop: int) -> Array:
    """Few blocks are cut; a copy keeps them of the layout that the kernels are compiled for."""
    return np.ascontiguousarray(block.raw[:, start:stop])


def within(thresholds: Sequence[Threshold], dropped: Sequence[Threshold] | None = None) -> list[Band]:
    """What each threshold keeps, unless it reaches its model's threshold in `dropped`"""
    return list(zip(thresholds, [KEEP_NONE] * len(thresholds) if dropped is None else dropped, strict=True))


def inliers(tensor: FusedTensor, density: Sequence[float], gamma: Sequence[float]) -> list[Band]:
    """The k largest entries that come after the floor(gamma * n) largest."""
    tops = [count_outliers(g, share, tensor.size) for g, share in zip(gamma, density, strict=True)]
    keeps = [top + count_kept(share, tensor.size) for top, share in zip(tops, density, strict=True)]
    models = range(len(keeps))
    found = largest(tensor, keeps + tops, [*models, *models])
    return within(found[: len(keeps)], found[len(keeps) :])


def band_pieces(block: Block, bands: Sequence[Band]) -> Iterator[tuple[int, int, Limits]]:
    """(start, stop) within the block of pieces without a cut, and what of each model stays there."""
    cuts = [threshold.cut for band in bands for threshold in band]
    for start, stop in edges(block, cuts):
        limits = []
        for least, most in bands:
            low, high = least.at(block.start + start), most.at(block.start + start)
            limits.append((np.uint32(low), np.uint32(max(0, high - low))))
        yield start, stop, tuple(limits)


def trimmed(bands: Sequence[Band]) -> Sparsifier:
    """1 for entries that stay."""

    def sparsify(block: Block) -> F32:
        out = _factors(len(bands), block)
        for start, stop, limits in band_pieces(block, bands):
            span = slice(start, stop)
            for m, (low, width) in enumerate(limits):
                _mark_within(block.raw[0, span], block.raw[m + 1, span], low, width, out[m, span])
        return out

    return sparsify


def random_masks(keys: Sequence[int], density: Sequence[float]) -> Mask:
    """Bernoulli(density): an element stays if its 32 random bits do not exceed density * 2^32 - 1."""
    words = []
    for key, share in zip(keys, density, strict=True):
        words.append((np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32), greatest_kept(np.float64(share))))
    return tuple(words)


def greatest_kept(share: Any) -> Any:
    """The greatest random number that keeps an entry; of a share or an array of them."""
    return np.clip(np.rint(share * 2.0**32) - 1, 0, 2**32 - 1).astype(np.uint32)


def mask_pieces(block: Block, masks: Mask) -> Iterator[tuple[int, int, Mask]]:
    """(start, stop) within the block, and the masks there: past 2^32 elements the second key moves on."""
    for start, stop in edges(block, range(_COUNTER, block.start + block.raw.shape[1], _COUNTER)):
        high = ((block.start + start) >> 32) * _HIGH
        yield start, stop, tuple((a, np.uint32((int(b) + high) & 0xFFFFFFFF), most) for a, b, most in masks)


def dropped(masks: Mask) -> Sparsifier:
    """1 for entries that a random mask keeps."""

    def sparsify(block: Block) -> F32:
        out = _factors(len(masks), block)
        for start, stop, here in mask_pieces(block, masks):
            for m, (key, other, most) in enumerate(here):
                _mark_random(key, other, most, block.start + start, out[m, start:stop])
        return out

    return sparsify


def dropped_by_rank(
    tensor: FusedTensor, keys: Sequence[int], density: Sequence[float], epsilon: Sequence[float], unbiased: bool
) -> Sparsifier:
    """1, or 1/p_i if unbiased, for entries kept with the probability p_i that their rank in their row gives them."""
    length = max(1, tensor.shape[-1] if tensor.shape else tensor.size)
    masks = random_masks(keys, density)
    tables = []
    for share, spread in zip(density, epsilon, strict=True):
        p = rank_probabilities(length, share, spread) if 0 < share < 1 else np.ones(1)
        tables.append((greatest_kept(p), (1 / p if unbiased else np.ones_like(p)).astype(np.float32)))

    def mark(base: Raw, tuned: Raw, start: int, m: int, out: F32) -> None:
        step = max(1, _SORTED // length) * length
        key, other, _ = masks[m]
        for first in range(0, len(out), step):
            span = slice(first, first + step)
            ordered, place = sorted_rows(base[span], tuned[span], length)
            _mark_ranked(ordered, place, *tables[m], key, other, start + first, out[span])

    # The engine cuts a long vector, which is one row; its factors are found once.
    split = len(tensor.shape) < 2 and tensor.n_chunks > 1
    whole = [_of_vector(tensor, m, mark) if 0 < share < 1 else None for m, share in enumerate(density)] if split else []

    def sparsify(block: Block) -> F32:
        out = _factors(len(keys), block)
        for m, share in enumerate(density):
            if not 0 < share < 1:
                out[m] = 1.0 if share > 0 else 0.0
            elif split:
                out[m] = whole[m][block.start : block.start + out.shape[1]]  # type: ignore[index]
            else:
                mark(block.raw[0], block.raw[m + 1], block.start, m, out[m])
        return out

    return sparsify


def rank_probabilities(length: int, density: float, epsilon: float) -> F64:
    """The probability of each rank in a row: from density - epsilon for the smallest to density + epsilon."""
    if length == 1:
        return np.array([density])
    return (density - epsilon) + np.arange(length, dtype=np.float64) * np.float64(2 * epsilon / (length - 1))


def _of_vector(tensor: FusedTensor, model: int, mark: Callable[[Raw, Raw, int, int, F32], None]) -> F32:
    pieces = tensor.map_chunks(lambda block: block.raw[[0, model + 1]])
    raw = np.concatenate(pieces, axis=1)
    out = np.empty(tensor.size, np.float32)
    mark(raw[0], raw[1], 0, model, out)
    return out


def l1_factors(tensor: FusedTensor, weight: tuple[float, ...], sparsify: Sparsifier) -> tuple[float, ...]:
    """weight * ‖d‖₁ / ‖what is kept of d‖₁ for each model; the weight alone where nothing is kept"""

    def chunk_sums(block: Block) -> F64:
        factors = sparsify(block)
        sums = np.zeros((len(weight), 2))
        for m in range(len(weight)):
            _sizes(block.raw[0], block.raw[m + 1], factors[m], sums[m])
        return sums

    if tensor.size == 0:
        return weight
    sums = np.array(tensor.map_chunks(chunk_sums))  # (chunk, model, 2)
    totals = [[math.fsum(sums[:, m, k]) for k in (0, 1)] for m in range(len(weight))]
    return tuple(w * (all_ / kept) if kept > 0 else w for w, (all_, kept) in zip(weight, totals, strict=True))


@kernel
def is_within(delta: np.float32, low: np.uint32, width: np.uint32) -> Truth:
    """Whether the magnitude bits are in [low, low + width); below low the difference wraps to a large number"""
    return sub32(magnitude_bits(delta), low) < width


@kernel
def _mark_within(base: Raw, tuned: Raw, low: np.uint32, width: np.uint32, out: F32) -> None:
    for i in range(out.shape[0]):
        out[i] = where(is_within(as_f32(tuned[i]) - as_f32(base[i]), low, width), np.float32(1), np.float32(0))


@kernel
def stays(index: Int, key: np.uint32, other_key: np.uint32, most: np.uint32) -> Truth:
    """Whether a random mask keeps an element: a function of its flat index and its model's key alone."""
    return mix32(add32(mix32(counter32(index, key)), other_key)) <= most


@kernel
def _mark_random(key: np.uint32, other_key: np.uint32, most: np.uint32, start: int, out: F32) -> None:
    for i in range(out.shape[0]):
        out[i] = where(stays(start + i, key, other_key, most), np.float32(1), np.float32(0))


@kernel
def _mark_ranked(
    ordered: U32, place: np.uint32, most: U32, times: F32, key: np.uint32, other_key: np.uint32, start: int, out: F32
) -> None:
    """ordered (rows, length), place: see sorted_rows; start: flat index of the first; out (rows * length,) float32

    most, times: tables by rank, of the greatest random number that keeps and of the factor of what is kept. In order of
    rank the tables are read from end to end and random numbers come from vector registers; all that is not is a store.
    """
    length = ordered.shape[1]
    factors = np.empty(length, np.float32)
    for row in range(ordered.shape[0]):
        places, into = ordered[row], out[row * length : (row + 1) * length]
        first = start + row * length
        low, high = np.uint32(first & 0xFFFFFFFF), first >> 32
        own = np.uint32((np.int64(other_key) + high * _HIGH) & 0xFFFFFFFF)
        after = np.uint32((np.int64(other_key) + (high + 1) * _HIGH) & 0xFFFFFFFF)
        for rank in range(length):
            counter = add32(low, places[rank] & place)
            second = where(counter >= low, own, after)  # the low half of the index began again within the row
            stays_ = mix32(add32(mix32(counter32(np.int64(counter), key)), second)) <= most[rank]
            factors[rank] = where(stays_, times[rank], np.float32(0))
        for rank in range(length):
            into[places[rank] & place] = factors[rank]


@kernel
def _sizes(base: Raw, tuned: Raw, factors: F32, sums: F64) -> None:
    """Adds ‖d‖₁ and ‖kept d‖₁ to sums (2,) float64."""
    lanes = np.zeros((2, LANES), np.float64)
    whole, kept = lanes[0], lanes[1]
    for start in range(0, factors.shape[0], LANES):
        b, x, f = base[start : start + LANES], tuned[start : start + LANES], factors[start : start + LANES]
        for lane in range(len(f)):
            size = abs(np.float64(as_f32(x[lane]) - as_f32(b[lane])))
            whole[lane] += size
            kept[lane] += where(f[lane] > 0, size * np.float64(f[lane]), 0.0)
    sums[0] += lanes[0].sum()
    sums[1] += lanes[1].sum()
