"""Fused kernels of the methods that choose or count entry by entry: nearswap, magmax, ram, ramplus_tl, sce.

Row 0 of a block is the base, and task vectors are formed while reading.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from merge.kernels.bits import as_f32, kernel, magnitude_bits
from merge.kernels.encode import LANES
from merge.kernels.protocol import Block, Combine, Floats, FusedTensor
from merge.kernels.selection import KEEP_ALL, KEEP_NONE, Threshold
from merge.kernels.spherical import n_inputs
from merge.methods.nearswap import LEAST
from merge.methods.ramplus_tl import unique_factor

_COARSE = 16  # bits of a float without its sign that the first histogram sees; the second one sees the other 15
_FINE = 31 - _COARSE
_TILE = 2048


def nearswap(tensor: FusedTensor, *, t: float) -> Combine:
    def combine(block: Block, out: Floats) -> None:
        _nearswap(block.raw, t, out)

    return combine


def magmax(tensor: FusedTensor, *, lambda_: float = 1.0) -> Combine:
    def combine(block: Block, out: Floats) -> None:
        _magmax(block.raw, lambda_, out)

    return combine


def ram(tensor: FusedTensor, *, epsilon: float = 1e-5) -> Combine:
    def combine(block: Block, out: Floats) -> None:
        _ram(block.raw, epsilon, np.ones(len(block.raw) - 1), out)

    return combine


def ramplus_tl(tensor: FusedTensor, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Combine:
    parts = tensor.map_chunks(lambda block: _shared_unique(block.raw, epsilon))
    counts = np.sum(parts, axis=0) if parts else np.zeros((1, 2))
    factors = np.array([unique_factor(int(shared), int(unique), r, alpha) for shared, unique in counts])

    def combine(block: Block, out: Floats) -> None:
        _ram(block.raw, epsilon, factors, out)

    return combine


def sce(tensor: FusedTensor, *, select_topk: float = 1.0, **unused: object) -> Combine:
    ones = (1.0,) * n_inputs(tensor)
    everything = select_topk >= 1
    limit = KEEP_ALL if everything else most_varying(tensor, select_topk, ones)
    bits, cut = limit.bits, min(limit.cut, tensor.size)
    sums = tensor.map_chunks(lambda block: _kept_squares(block.raw, everything, bits, cut, block.start, ones))
    squares = [math.fsum(column) for column in zip(*sums, strict=True)]
    total = math.fsum(squares)
    weights = tuple(square / total for square in squares) if total > 0 else ones

    def combine(block: Block, out: Floats) -> None:
        _sce(block.raw, everything, bits, cut, block.start, weights, out)

    return combine


def most_varying(tensor: FusedTensor, share: float, models: tuple[float, ...]) -> Threshold:
    """The threshold on the models' standard deviation that keeps floor(share m) of the m entries that differ.

    `models` has an element for each model: kernels unroll by its length.
    """

    def histogram(low: int, shift: int, width: int) -> Any:
        states = tensor.fold_chunks(
            lambda: np.zeros(width + 1, np.int64),
            lambda counts, block: _histogram(block.raw, low, shift, models, counts),
        )
        return np.sum(states, axis=0)

    coarse = histogram(0, _FINE, 1 << _COARSE)
    keep = int(share * (tensor.size - coarse[-1]))  # the last place counts what does not differ
    if keep == 0:
        return KEEP_NONE
    bucket, above = _kth(coarse[:-1], keep)
    fine = histogram(bucket << _FINE, 0, 1 << _FINE)[:-1]
    place, over = _kth(fine, keep - above)
    bits, quota = (bucket << _FINE) + place, keep - above - over
    if quota == fine[place]:
        return Threshold(bits, KEEP_ALL.cut)
    equal: Any = np.cumsum(
        tensor.map_chunks(lambda block: _place_of_equal(block.raw, bits, block.raw.shape[1] + 1, models)[0])
    )
    chunk = int(np.searchsorted(equal, quota))
    wanted = quota - (int(equal[chunk - 1]) if chunk else 0)
    (cut,) = tensor.map_chunks(
        lambda block: block.start + _place_of_equal(block.raw, bits, wanted, models)[1] + 1, [chunk]
    )
    return Threshold(bits, cut)


def _kth(counts: Any, k: int) -> tuple[int, int]:
    """(place of the k-th from the top, how many are in the places above it)"""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])


@kernel
def _nearswap(raw: Any, t: float, out: Any) -> None:
    for i in range(raw.shape[1]):
        base, other = np.float64(as_f32(raw[0, i])), np.float64(as_f32(raw[1, i]))
        share = min(t / max(abs(base - other), LEAST), 1.0)
        out[i] = np.float32(share * other + (1.0 - share) * base)


@kernel
def _magmax(raw: Any, scale: float, out: Any) -> None:
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        best = as_f32(raw[1, i]) - base
        for m in range(2, raw.shape[0]):
            delta = as_f32(raw[m, i]) - base
            best = delta if magnitude_bits(delta) > magnitude_bits(best) else best
        out[i] = np.float32(np.float64(base) + scale * np.float64(best))


@kernel
def _shared_unique(raw: Any, epsilon: float) -> Any:
    """raw (1 + model, n) -> (model, 2): active entries of each model that others share, and that are its own"""
    counts = np.zeros((raw.shape[0] - 1, 2), np.int64)
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        active = 0
        for m in range(1, raw.shape[0]):
            active += 1 if abs(np.float64(as_f32(raw[m, i]) - base)) > epsilon else 0
        for m in range(1, raw.shape[0]):
            if abs(np.float64(as_f32(raw[m, i]) - base)) > epsilon:
                counts[m - 1, 1 if active == 1 else 0] += 1
    return counts


@kernel
def _ram(raw: Any, epsilon: float, factors: Any, out: Any) -> None:
    """raw (1 + model, n), factors (model,) of entries that one model alone changed -> out"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        active = 0
        factor = 1.0
        for m in range(1, raw.shape[0]):
            delta = np.float64(as_f32(raw[m, i]) - base)
            if abs(delta) > epsilon:
                total += delta
                active += 1
                factor = factors[m - 1]
        if active == 1:
            total *= factor
        elif active > 1:
            total /= active
        out[i] = np.float32(np.float64(base) + total)


@kernel
def _deviation_bits(raw: Any, i: int, models: Any) -> Any:
    """raw (1 + model, n) -> bits of the float32 population standard deviation of the task vectors at i, as int64"""
    base = as_f32(raw[0, i])
    mean = 0.0
    for m in range(len(models)):
        mean += np.float64(as_f32(raw[m + 1, i]) - base)
    mean /= len(models)
    squares = 0.0
    for m in range(len(models)):
        apart = np.float64(as_f32(raw[m + 1, i]) - base) - mean
        squares += apart * apart
    return np.int64(magnitude_bits(np.float32(math.sqrt(squares / len(models)))))


@kernel
def _histogram(raw: Any, low: int, shift: int, models: Any, counts: Any) -> None:
    """Counts deviations in buckets from low; the last place counts those that are zero"""
    width = counts.shape[0] - 1
    tile = np.empty(_TILE, np.int64)
    for start in range(0, raw.shape[1], _TILE):
        n = min(_TILE, raw.shape[1] - start)
        for i in range(n):
            tile[i] = _deviation_bits(raw, start + i, models)
        for i in range(n):
            place = (tile[i] - low) >> shift
            if tile[i] == 0:
                counts[width] += 1
            elif 0 <= place < width:
                counts[place] += 1


@kernel
def _place_of_equal(raw: Any, bits: int, wanted: int, models: Any) -> Any:
    """(number, index of the last) of deviations that equal bits, up to the wanted-th"""
    count, last = 0, 0
    for i in range(raw.shape[1]):
        if count < wanted and _deviation_bits(raw, i, models) == bits:
            count += 1
            last = i
    return count, last


@kernel
def _stays(raw: Any, everything: bool, least: int, cut: int, start: int, i: int, models: Any, tile: Any) -> None:
    """Whether the entries from i stay, into the tile: those whose deviation is above the threshold"""
    n = min(_TILE, raw.shape[1] - i)
    if everything:
        tile[:n] = 1.0
        return
    for k in range(n):
        bits = _deviation_bits(raw, i + k, models)
        tile[k] = 1.0 if bits > least or (bits == least and start + i + k < cut) else 0.0


@kernel
def _kept_squares(raw: Any, everything: bool, least: int, cut: int, start: int, models: Any) -> Any:
    """raw (1 + model, n) -> squared length of what stays of each task vector (model,) float64"""
    tile = np.empty(_TILE, np.float64)
    lanes = np.zeros((len(models), LANES), np.float64)
    for first in range(0, raw.shape[1], _TILE):
        _stays(raw, everything, least, cut, start, first, models, tile)
        n = min(_TILE, raw.shape[1] - first)
        for m in range(len(models)):
            for wide in range(0, n - LANES + 1, LANES):
                for lane in range(LANES):
                    i = wide + lane
                    delta = tile[i] * np.float64(as_f32(raw[m + 1, first + i]) - as_f32(raw[0, first + i]))
                    lanes[m, lane] += delta * delta
            for i in range(n - n % LANES, n):
                delta = tile[i] * np.float64(as_f32(raw[m + 1, first + i]) - as_f32(raw[0, first + i]))
                lanes[m, i % LANES] += delta * delta
    return lanes.sum(axis=1)


@kernel
def _sce(raw: Any, everything: bool, least: int, cut: int, start: int, weights: Any, out: Any) -> None:
    """Elects signs and averages what agrees, of what stays; with selects and no branches, see task_vectors"""
    tile = np.empty(_TILE, np.float64)
    for first in range(0, raw.shape[1], _TILE):
        _stays(raw, everything, least, cut, start, first, weights, tile)
        for k in range(min(_TILE, raw.shape[1] - first)):
            base = as_f32(raw[0, first + k])
            total = 0.0
            for m in range(len(weights)):
                total += np.float64(as_f32(raw[m + 1, first + k]) - base)
            sign = tile[k] if total >= 0.0 else -tile[k]
            agreed = 0.0
            divisor = 0.0
            for m in range(len(weights)):
                delta = sign * np.float64(as_f32(raw[m + 1, first + k]) - base)
                agreed += weights[m] * delta if delta > 0.0 else 0.0
                divisor += weights[m] if delta > 0.0 else 0.0
            agreed /= divisor if divisor != 0.0 else 1.0
            out[first + k] = np.float32(np.float64(base) + sign * agreed)
