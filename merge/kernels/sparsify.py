"""What sparsifiers leave of task vectors: for each entry a factor, 0 where it is dropped.

A sparsifier is made once for a tensor and then called for every block. Methods whose default must be as fast as
memory (ties, DARE) test thresholds and random numbers in their own kernels instead; all else combines these factors.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.kernels.bits import add32, as_f32, counter32, kernel, magnitude_bits, mix32
from merge.kernels.protocol import Block, Floats, FusedTensor
from merge.kernels.selection import KEEP_NONE, Threshold, count_kept, count_outliers, largest

_COUNTER = 1 << 32  # the random counter's low half; blocks are cut there
_SHORT = 32  # rows up to this length are ranked by comparing all pairs
_WIDE = 1024  # rows from this length on are sorted by wide digits

# Block -> (model, n) float32, valid until the same thread's next call.
Sparsifier = Callable[[Block], Floats]
# A random mask as kernels take it: (key, key, greatest random number that keeps) for each model, as uint32.
Mask = tuple[Any, ...]


class _Scratch(threading.local):
    """Each thread's arrays, used again from block to block."""

    def array(self, name: str, size: int, dtype: Any) -> npt.NDArray[Any]:
        held = getattr(self, name, None)
        if held is None or held.size < size:
            held = np.empty(size, dtype)
            setattr(self, name, held)
        view: npt.NDArray[Any] = held[:size]
        return view


_scratch = _Scratch()


def _factors(n_models: int, block: Block) -> Floats:
    n = block.raw.shape[1]
    return _scratch.array("factors", n_models * n, np.float32).reshape(n_models, n)


def edges(block: Block, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) within the block of its pieces between those flat indices."""
    n = block.raw.shape[1]
    inside = sorted({cut - block.start for cut in cuts if 0 < cut - block.start < n})
    yield from itertools.pairwise([0, *inside, n])


def trimmed(thresholds: Sequence[Threshold], dropped: Sequence[Threshold] | None = None) -> Sparsifier:
    """1 for entries that a threshold keeps, unless they reach their model's threshold in `dropped`."""
    dropped = [KEEP_NONE] * len(thresholds) if dropped is None else dropped

    def sparsify(block: Block) -> Floats:
        out = _factors(len(thresholds), block)
        for m, (least, most) in enumerate(zip(thresholds, dropped, strict=True)):
            for start, stop in edges(block, [least.cut, most.cut]):
                here = block.start + start
                span = slice(start, stop)
                limits = np.uint32(least.at(here)), np.uint32(most.at(here))
                _mark_between(block.raw[0, span], block.raw[m + 1, span], *limits, out[m, span])
        return out

    return sparsify


def without_outliers(tensor: FusedTensor, density: Sequence[float], gamma: Sequence[float]) -> Sparsifier:
    """1 for the k largest entries that come after the floor(gamma * n) largest."""
    tops = [count_outliers(g, share, tensor.size) for g, share in zip(gamma, density, strict=True)]
    keeps = [top + count_kept(share, tensor.size) for top, share in zip(tops, density, strict=True)]
    models = range(len(keeps))
    found = largest(tensor, keeps + tops, [*models, *models])
    return trimmed(found[: len(keeps)], found[len(keeps) :])


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
        high = ((block.start + start) >> 32) * 0x85EBCA6B
        yield start, stop, tuple((a, np.uint32((int(b) + high) & 0xFFFFFFFF), most) for a, b, most in masks)


def dropped(masks: Mask) -> Sparsifier:
    """1 for entries that a random mask keeps."""

    def sparsify(block: Block) -> Floats:
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
    # The engine cuts a long vector, which is one row; its ranks are found once.
    split = len(tensor.shape) < 2 and tensor.n_chunks > 1
    whole = [_ranks_of_vector(tensor, m) if 0 < share < 1 else None for m, share in enumerate(density)] if split else []

    def sparsify(block: Block) -> Floats:
        out = _factors(len(keys), block)
        n = block.raw.shape[1]
        for m, share in enumerate(density):
            if not 0 < share < 1:
                out[m] = 1.0 if share > 0 else 0.0
                continue
            if split:
                ranks = whole[m][block.start : block.start + n]  # type: ignore[index]
            else:
                ranks = _scratch.array("ranks", n, np.uint32)
                rank_rows(block.raw[0], block.raw[m + 1], length, ranks)
            for start, stop, here in mask_pieces(block, (masks[m],)):
                key, other, _ = here[0]
                _mark_ranked(ranks[start:stop], *tables[m], key, other, block.start + start, out[m, start:stop])
        return out

    return sparsify


def rank_probabilities(length: int, density: float, epsilon: float) -> npt.NDArray[np.float64]:
    """The probability of each rank in a row: from density - epsilon for the smallest to density + epsilon."""
    if length == 1:
        return np.array([density])
    return (density - epsilon) + np.arange(length, dtype=np.float64) * np.float64(2 * epsilon / (length - 1))


def _ranks_of_vector(tensor: FusedTensor, model: int) -> npt.NDArray[np.uint32]:
    pieces = tensor.map_chunks(lambda block: block.raw[[0, model + 1]])
    raw = np.concatenate(pieces, axis=1)
    ranks = np.empty(tensor.size, np.uint32)
    rank_rows(raw[0], raw[1], tensor.size, ranks)
    return ranks


def l1_factors(tensor: FusedTensor, weight: tuple[float, ...], sparsify: Sparsifier) -> tuple[float, ...]:
    """weight * ‖d‖₁ / ‖what is kept of d‖₁ for each model; the weight alone where nothing is kept"""

    def chunk_sums(block: Block) -> npt.NDArray[np.float64]:
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
def _mark_between(base: Any, tuned: Any, least: Any, most: Any, out: Any) -> None:
    """1 where least <= magnitude bits of the delta < most"""
    for i in range(out.shape[0]):
        size = magnitude_bits(as_f32(tuned[i]) - as_f32(base[i]))
        out[i] = np.float32(1) if (size >= least) & (size < most) else np.float32(0)


@kernel
def stays(index: Any, key: Any, other_key: Any, most: Any) -> Any:
    """Whether a random mask keeps an element: a function of its flat index and its model's key alone."""
    return mix32(add32(mix32(counter32(index, key)), other_key)) <= most


@kernel
def _mark_random(key: Any, other_key: Any, most: Any, start: int, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = np.float32(1) if stays(start + i, key, other_key, most) else np.float32(0)


@kernel
def _mark_ranked(ranks: Any, most: Any, times: Any, key: Any, other_key: Any, start: int, out: Any) -> None:
    """most, times: tables by rank, of the greatest random number that keeps and of the factor of what is kept"""
    for i in range(out.shape[0]):
        rank = ranks[i]
        factor, limit = times[rank], most[rank]  # read in any case: no branch, half of which would be guessed wrong
        out[i] = factor if stays(start + i, key, other_key, limit) else np.float32(0)


@kernel
def _sizes(base: Any, tuned: Any, factors: Any, sums: Any) -> None:
    """Adds ‖d‖₁ and ‖kept d‖₁ to sums (2,) float64."""
    for i in range(factors.shape[0]):
        size = abs(np.float64(as_f32(tuned[i]) - as_f32(base[i])))
        sums[0] += size
        sums[1] += size * np.float64(factors[i]) if factors[i] > 0 else 0.0


@kernel
def rank_rows(base: Any, tuned: Any, length: int, ranks: Any) -> None:
    """The rank, from 0, of each delta's magnitude in its row; of equal ones the earlier ranks lower."""
    sizes = np.empty(length, np.uint32)
    items = np.empty(length, np.uint64)
    other = np.empty(length, np.uint64)
    width = 11 if length >= _WIDE else 8
    counts = np.empty((-(-31 // width), 1 << width), np.uint32)
    for start in range(0, ranks.shape[0], length):
        for i in range(length):
            sizes[i] = magnitude_bits(as_f32(tuned[start + i]) - as_f32(base[start + i]))
        if length <= _SHORT:
            _rank_by_pairs(sizes, ranks[start : start + length])
        else:
            _rank_by_digits(sizes, width, counts, items, other, ranks[start : start + length])


@kernel
def _rank_by_pairs(sizes: Any, ranks: Any) -> None:
    for i in range(sizes.shape[0]):
        rank = 0
        for j in range(i):
            rank += sizes[j] <= sizes[i]
        for j in range(i + 1, sizes.shape[0]):
            rank += sizes[j] < sizes[i]
        ranks[i] = rank


@kernel
def _rank_by_digits(sizes: Any, width: int, counts: Any, items: Any, other: Any, ranks: Any) -> None:
    """A radix sort from the lowest digit on, of sizes with their places (in the low 32 bits); stable, no branches."""
    n_digits, n_buckets = counts.shape
    digit_mask = np.uint64(n_buckets - 1)
    counts[:] = 0
    if n_digits == 3:
        low, middle, high = counts[0], counts[1], counts[2]
        for i in range(sizes.shape[0]):
            size = np.uint64(sizes[i])
            low[size & digit_mask] += 1
            middle[(size >> np.uint64(width)) & digit_mask] += 1
            high[(size >> np.uint64(2 * width)) & digit_mask] += 1
            items[i] = (size << np.uint64(32)) | np.uint64(i)
    else:
        for i in range(sizes.shape[0]):
            size = np.uint64(sizes[i])
            for digit in range(n_digits):
                counts[digit, (size >> np.uint64(digit * width)) & digit_mask] += 1
            items[i] = (size << np.uint64(32)) | np.uint64(i)
    for digit in range(n_digits):
        count = counts[digit]
        below = np.uint32(0)
        for bucket in range(n_buckets):
            here = count[bucket]
            count[bucket] = below
            below = add32(below, here)
        shift = np.uint64(32 + digit * width)
        if digit < n_digits - 1:
            for i in range(sizes.shape[0]):
                item = items[i]
                value = (item >> shift) & digit_mask
                place = count[value]
                count[value] = add32(place, np.uint32(1))
                other[place] = item
            items, other = other, items
        else:
            for i in range(sizes.shape[0]):
                item = items[i]
                value = (item >> shift) & digit_mask
                place = count[value]
                count[value] = add32(place, np.uint32(1))
                ranks[item & np.uint64(0xFFFFFFFF)] = place
