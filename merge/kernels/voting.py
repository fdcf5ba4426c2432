"""Fused kernels of the methods that choose or count entry by entry: nearswap, magmax, ram, ramplus_tl, sce.

Row 0 of a block is the base, and task vectors are formed while reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from merge.arrays import F32, F64, I64, Numbers, Raw
from merge.kernels.bits import Count, as_f32, count32, kernel, magnitude_bits, quotient, where
from merge.kernels.coefficients import NEARSWAP_LEAST, unique_factor
from merge.kernels.computed import Computed
from merge.kernels.encode import LANES
from merge.kernels.protocol import Block, Combine, FusedTensor
from merge.kernels.scratch import Scratch
from merge.kernels.selection import KEEP_ALL, Threshold, largest
from merge.kernels.sparsify import columns, edges
from merge.kernels.spherical import n_inputs

_TINY = 1e-30  # a deviation of differences above this is not below float32's range, with up to 1e6 models
_TILE = 2048  # elements that stay in the first-level cache from model to model
_scratch = Scratch()


def nearswap(tensor: FusedTensor, *, t: float) -> Combine:
    def combine(block: Block, out: F32) -> None:
        _nearswap(block.raw, t, out)

    return combine


def magmax(tensor: FusedTensor, *, lambda_: float = 1.0) -> Combine:
    ones = (1.0,) * n_inputs(tensor)  # kernels unroll by its length

    def combine(block: Block, out: F32) -> None:
        _magmax(block.raw, ones, lambda_, out)

    return combine


def ram(tensor: FusedTensor, *, epsilon: float = 1e-5) -> Combine:
    return _ram_by(epsilon, (1.0,) * n_inputs(tensor))


def ramplus_tl(tensor: FusedTensor, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Combine:
    ones = (1.0,) * n_inputs(tensor)
    least = _at_most(epsilon)
    parts = tensor.map_chunks(lambda block: _shared_unique(block.raw, least, ones))
    counts = np.sum(parts, axis=0) if parts else np.zeros((1, 2))
    factors = tuple(unique_factor(int(shared), int(unique), r, alpha) for shared, unique in counts)
    return _ram_by(epsilon, factors)


def _at_most(number: float) -> np.float32:
    """The largest float32 that is not above a number: float32 numbers exceed both or neither"""
    near = np.float32(number)
    return near if float(near) <= number else np.nextafter(near, np.float32(-np.inf))


def _ram_by(epsilon: float, factors: Numbers) -> Combine:
    def combine(block: Block, out: F32) -> None:
        _ram(block.raw, epsilon, factors, out)

    return combine


def sce(tensor: FusedTensor, *, select_topk: float = 1.0, **unused: object) -> Combine:
    ones = (1.0,) * n_inputs(tensor)
    limit = KEEP_ALL if select_topk >= 1 else most_varying(tensor, select_topk, ones)

    def pieces(block: Block) -> Iterator[tuple[int, int, F32, np.uint32]]:
        """(start, stop, deviations, least bits that stay) of a block, cut where those change"""
        spread = _scratch.array("spread", block.raw.shape[1], np.float32)
        if limit is not KEEP_ALL:
            _deviations(block.raw, ones, spread)
        for start, stop in edges(block, [limit.cut]):
            yield start, stop, spread[start:stop], np.uint32(limit.at(block.start + start))

    def squares(block: Block) -> F64:
        sums = np.zeros(len(ones))
        for start, stop, spread, least in pieces(block):
            for m in range(len(ones)):
                sums[m] += _kept_squares(block.raw[0, start:stop], block.raw[m + 1, start:stop], spread, least)
        return sums

    parts = tensor.map_chunks(squares)
    strengths = [math.fsum(column) for column in zip(*parts, strict=True)]
    total = math.fsum(strengths)
    weights = tuple(strength / total for strength in strengths) if total > 0 else ones

    def combine(block: Block, out: F32) -> None:
        for start, stop, spread, least in pieces(block):
            _sce(columns(block, start, stop), spread, least, weights, out[start:])

    return combine


def most_varying(tensor: FusedTensor, share: float, models: Numbers) -> Threshold:
    """The threshold on the models' standard deviation that keeps floor(share m) of the m entries that differ.

    `models` has an element for each model: kernels unroll by its length.
    """

    def differing(block: Block) -> int:
        """Entries whose standard deviation is not zero"""
        count, tiny = _count_differing(block.raw, models)
        if tiny:  # their deviations may round to zero
            spread = _scratch.array("spread", block.raw.shape[1], np.float32)
            _deviations(block.raw, models, spread)
            count = int(np.count_nonzero(spread))
        return int(count)

    spreads = Computed(tensor, lambda block, out: _deviations(block.raw, models, out))
    return largest(spreads, [int(share * sum(tensor.map_chunks(differing)))])[0]


@kernel
def _nearswap(raw: Raw, t: float, out: F32) -> None:
    for i in range(raw.shape[1]):
        base, other = np.float64(as_f32(raw[0, i])), np.float64(as_f32(raw[1, i]))
        share = min(t / max(abs(base - other), NEARSWAP_LEAST), 1.0)
        out[i] = np.float32(share * other + (1.0 - share) * base)


@kernel
def _magmax(raw: Raw, models: Numbers, scale: float, out: F32) -> None:
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        best = as_f32(raw[1, i]) - base
        for m in range(1, len(models)):
            delta = as_f32(raw[m + 1, i]) - base
            best = where(magnitude_bits(delta) > magnitude_bits(best), delta, best)
        out[i] = np.float32(np.float64(base) + scale * np.float64(best))


@kernel
def _shared_unique(raw: Raw, epsilon: np.float32, models: Numbers) -> I64:
    """raw (1 + model, n), epsilon float32 -> (model, 2): active entries of each model that others share, and its own"""
    counts = np.zeros((len(models), 2), np.int64)
    n_active = np.empty(_TILE, np.float32)
    for start in range(0, raw.shape[1], _TILE):
        base = raw[0, start : start + _TILE]
        for i in range(len(base)):
            n_active[i] = 0
        for m in range(len(models)):
            tuned = raw[m + 1, start : start + _TILE]
            for i in range(len(base)):
                here = abs(as_f32(tuned[i]) - as_f32(base[i])) > epsilon
                n_active[i] += where(here, np.float32(1), np.float32(0))
        for m in range(len(models)):
            tuned = raw[m + 1, start : start + _TILE]
            active, alone = np.uint32(0), np.uint32(0)
            for i in range(len(base)):
                here = abs(as_f32(tuned[i]) - as_f32(base[i])) > epsilon
                active, alone = count32(active, here), count32(alone, here & (n_active[i] == 1))
            counts[m, 0] += np.int64(active) - np.int64(alone)
            counts[m, 1] += np.int64(alone)
    return counts


@kernel
def _ram(raw: Raw, epsilon: float, factors: Numbers, out: F32) -> None:
    """raw (1 + model, n), factors a tuple: of entries that one model alone changed -> out"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total, active, factor = 0.0, 0.0, 1.0
        for m in range(len(factors)):
            delta = np.float64(as_f32(raw[m + 1, i]) - base)
            here = abs(delta) > epsilon
            total += where(here, delta, 0.0)
            active += where(here, 1.0, 0.0)
            factor = where(here, factors[m], factor)
        times = where(active == 1.0, factor, 1.0)
        out[i] = np.float32(np.float64(base) + total * times / max(active, 1.0))


@kernel
def _deviations(raw: Raw, models: Numbers, out: F32) -> None:
    """raw (1 + model, n) -> population standard deviations of the task vectors, rounded to float32"""
    n = np.float64(len(models))
    inverse = 1.0 / n
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(models)):
            total += np.float64(as_f32(raw[m + 1, i]) - base)
        mean = quotient(total, n, inverse)
        squares = 0.0
        for m in range(len(models)):
            apart = np.float64(as_f32(raw[m + 1, i]) - base) - mean
            squares += apart * apart
        out[i] = np.float32(math.sqrt(quotient(squares, n, inverse)))


@kernel
def _count_differing(raw: Raw, models: Numbers) -> tuple[Count, Count]:
    """raw (1 + model, n) -> how many entries' task vectors differ, and how many of them by next to nothing"""
    count, tiny = np.uint32(0), np.uint32(0)
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        first = as_f32(raw[1, i]) - base
        apart = first - first  # NaN where it is not finite
        for m in range(1, len(models)):
            apart += abs((as_f32(raw[m + 1, i]) - base) - first)
        count, tiny = count32(count, apart != 0), count32(tiny, (apart != 0) & (apart < np.float32(_TINY)))
    return count, tiny


@kernel
def _kept_squares(base: Raw, tuned: Raw, spread: F32, least: np.uint32) -> float:
    """Squared length of what stays of a task vector"""
    lanes = np.zeros(LANES, np.float64)
    for start in range(0, base.shape[0], LANES):
        b, x, s = base[start : start + LANES], tuned[start : start + LANES], spread[start : start + LANES]
        for lane in range(len(b)):
            delta = np.float64(as_f32(x[lane]) - as_f32(b[lane]))
            lanes[lane] += where(magnitude_bits(s[lane]) >= least, delta * delta, 0.0)
    return float(lanes.sum())


@kernel
def _sce(raw: Raw, spread: F32, least: np.uint32, weights: Numbers, out: F32) -> None:
    """Elects signs and averages what agrees, of what stays; with selects and no branches, see task_vectors"""
    for i in range(raw.shape[1]):
        base = as_f32(raw[0, i])
        total = 0.0
        for m in range(len(weights)):
            total += np.float64(as_f32(raw[m + 1, i]) - base)
        sign = where(total >= 0.0, 1.0, -1.0)
        sign = where(magnitude_bits(spread[i]) >= least, sign, 0.0)
        agreed = 0.0
        divisor = 0.0
        for m in range(len(weights)):
            delta = sign * np.float64(as_f32(raw[m + 1, i]) - base)
            agreed += where(delta > 0.0, weights[m] * delta, 0.0)
            divisor += where(delta > 0.0, weights[m], 0.0)
        agreed /= where(divisor != 0.0, divisor, 1.0)
        out[i] = np.float32(np.float64(base) + sign * agreed)
