"""Fused kernels of the methods on the sphere: nuslerp, multislerp, karcher, model_stock.

Their results are sums of the inputs, and the coefficients need no more than inner products. One pass sums the Gram
matrix of the inputs (of their task vectors, where row 0 of a block is a base), and one pass combines; vectors that are
rows of a tensor lie whole in a block, and need one pass only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from merge.arrays import F32, F64, Numbers, Raw
from merge.kernels.bits import Number, as_f32, kernel
from merge.kernels.coefficients import KARCHER_TINY, NUSLERP_COLINEAR, multislerp_factors, nuslerp_place
from merge.kernels.elementwise import weighted_sum
from merge.kernels.encode import LANES
from merge.kernels.functions import acos, cos, sin
from merge.kernels.protocol import Block, Combine, FusedTensor

Rows = Sequence[Sequence[float]]
_GROUP = 16  # chunks whose column sums are held at once
_NEARLY_ZERO = 1e-8  # |s|^2 over (sum |w|)^2 from which the Gram matrix has lost half its digits


def nuslerp(
    tensor: FusedTensor, *, weight: Numbers, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Combine:
    t = nuslerp_place(weight)
    if nuslerp_flatten or len(tensor.shape) < 2:
        gram = gram_matrix(tensor, 2)
        return combine_by(arc_factors(gram[0, 0], gram[1, 1], gram[0, 1], t))
    if nuslerp_row_wise:
        return _by_columns(tensor, t)
    row = tensor.shape[-1]

    def combine(block: Block, out: F32) -> None:
        _arc_rows(block.raw, len(block.raw) - 2, row, t, out)

    return combine


def multislerp(tensor: FusedTensor, *, weight: Numbers, normalize_weights: bool = True, eps: float = 1e-8) -> Combine:
    if len(weight) == 1:
        return combine_by((1.0,))
    gram = gram_matrix(tensor, len(weight))
    rows, lengths = gram.tolist(), [math.sqrt(square) for square in gram.diagonal().tolist()]

    def length_of(coefficients: Numbers) -> float:
        square = _square(rows, coefficients)
        most = _dot([abs(c) for c in coefficients], lengths)
        if square < _NEARLY_ZERO * most * most:
            (square,) = tensor.sum_chunks(lambda raw, out: _sum_squares(raw, coefficients, out), 1)
        return math.sqrt(square)

    return combine_by(multislerp_factors(lengths, weight, normalize_weights, eps, length_of))


def karcher(tensor: FusedTensor, *, weight: Numbers, max_iter: int = 10, tol: float = 1e-5) -> Combine:
    gram = gram_matrix(tensor, len(weight))
    return combine_by(karcher_factors(gram, weight, int(max_iter), tol))


def model_stock(tensor: FusedTensor, *, filter_wise: bool = False, clamp: bool = True) -> Combine:
    if filter_wise and len(tensor.shape) > 1:
        row = tensor.shape[-1]

        def combine(block: Block, out: F32) -> None:
            _stock_rows(block.raw, row, clamp, out)

        return combine
    n_models = n_inputs(tensor)
    return combine_by((_ratio(gram_matrix(tensor, n_models), clamp) / n_models,) * n_models)


def combine_by(coefficients: Numbers) -> Combine:
    """Sum of coefficient times input; with a base, of coefficient times task vector, plus the base."""
    with_base = (1.0 - math.fsum(coefficients), *coefficients)

    def combine(block: Block, out: F32) -> None:
        weighted_sum(block.raw, coefficients if len(block.raw) == len(coefficients) else with_base, 1.0, out)

    return combine


def gram_matrix(tensor: FusedTensor, n_models: int) -> F64:
    """Inner products of the inputs, or of their task vectors, (n_models, n_models)"""
    sums = tensor.sum_chunks(lambda raw, out: _gram_sums(raw, n_models, out), n_models * (n_models + 1) // 2)
    gram = np.zeros((n_models, n_models))
    upper = np.triu_indices(n_models)
    gram[upper] = sums
    gram.T[upper] = sums
    return gram


def n_inputs(tensor: FusedTensor) -> int:
    """Number of inputs of a method with a base; 1 if there is nothing to read."""
    return tensor.map_chunks(lambda block: len(block.raw) - 1, [0])[0] if tensor.n_chunks else 1


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    """Added in order: BLAS and numpy choose theirs by the processor, and Python's own sum by its version."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        total += a * b
    return total


def _square(gram: Rows, coefficients: Sequence[float]) -> float:
    return max(0.0, _dot(coefficients, [_dot(row, coefficients) for row in gram]))


def karcher_factors(gram: F64, weight: Numbers, max_iter: int, tol: float) -> Numbers:
    """The inputs' coefficients in their Karcher mean; see merge.methods.karcher."""
    if not np.isfinite(gram).all():
        return (math.nan,) * len(weight)
    lengths = [math.sqrt(square) for square in gram.diagonal().tolist()]
    used = [i for i, length in enumerate(lengths) if length > tol and weight[i] > 0]
    if not used:
        return tuple(w / math.fsum(weight) for w in weight)
    total = math.fsum(weight[i] for i in used)
    shares = [weight[i] / total for i in used]
    units = [[float(gram[i, j]) / (lengths[i] * lengths[j]) for j in used] for i in used]
    mean = _karcher_mean(units, shares, max_iter, tol)
    scale = _dot(shares, [lengths[i] for i in used])
    found = {i: scale * m / lengths[i] for i, m in zip(used, mean, strict=True)}
    return tuple(found.get(i, 0.0) for i in range(len(weight)))


def _karcher_mean(units: Rows, shares: list[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of unit vectors in their mean, from their inner products"""
    mean, length = shares, math.sqrt(_square(units, shares))
    mean = [1.0] + [0.0] * (len(mean) - 1) if length < KARCHER_TINY else [m / length for m in mean]
    for _ in range(max_iter):
        cosines = [min(1.0, max(-1.0, _dot(row, mean))) for row in units]
        towards = [share * _stretch(acos(cosine)) for share, cosine in zip(shares, cosines, strict=True)]
        back = _dot(towards, cosines)
        step = [t - back * m for t, m in zip(towards, mean, strict=True)]
        length = math.sqrt(_square(units, step))
        if length < max(tol, KARCHER_TINY):
            break
        along, across = cos(length), sin(length) / length
        mean = [along * m + across * s for m, s in zip(mean, step, strict=True)]
        length = math.sqrt(_square(units, mean))
        mean = [m / length for m in mean]
    return mean


def _stretch(angle: float) -> float:
    """Length of an arc over that of its sine; 0 for opposite directions, of which none is the nearest"""
    if math.pi - angle < KARCHER_TINY:
        return 0.0
    return 1.0 if angle < KARCHER_TINY else angle / sin(angle)


def _by_columns(tensor: FusedTensor, t: float) -> Combine:
    columns = tensor.size // max(1, tensor.shape[0])
    sums = _in_order(tensor, lambda block: _column_sums(block.raw, len(block.raw) - 2, block.start, columns), columns)
    found = np.empty((2, columns))
    for column in range(columns):
        found[:, column] = arc_factors(sums[0, column], sums[1, column], sums[2, column], t)

    def combine(block: Block, out: F32) -> None:
        _combine_columns(block.raw, len(block.raw) - 2, block.start, found, out)

    return combine


def _in_order(tensor: FusedTensor, function: Callable[[Block], F64], columns: int) -> F64:
    """Sum of what the chunks give, added in their order, a few chunks in memory at a time"""
    total = np.zeros((3, columns))
    for first in range(0, tensor.n_chunks, _GROUP):
        for part in tensor.map_chunks(function, range(first, min(first + _GROUP, tensor.n_chunks))):
            total += part
    return total


@kernel
def _value(entry: Number, base: Number, apart: bool) -> np.float32:
    """An entry of an input, or of its task vector where row 0 is a base; float32, as in the definition"""
    value = as_f32(entry)
    return value - as_f32(base) if apart else value


@kernel
def _inner(one: Raw, other: Raw, base: Raw, apart: bool) -> float:
    """Inner product of two inputs, or of their task vectors"""
    lanes = np.zeros(LANES, np.float64)
    n_wide = len(base) // LANES * LANES
    for at in range(0, n_wide, LANES):
        for lane in range(LANES):
            i = at + lane
            first, second = _value(one[i], base[i], apart), _value(other[i], base[i], apart)
            lanes[lane] += np.float64(first) * np.float64(second)
    for lane in range(len(base) - n_wide):
        i = n_wide + lane
        first, second = _value(one[i], base[i], apart), _value(other[i], base[i], apart)
        lanes[lane] += np.float64(first) * np.float64(second)
    return float(lanes.sum())


@kernel
def _gram_sums(raw: Raw, n_models: int, out: F64) -> None:
    """raw (source, n) -> out: the upper triangle of the Gram matrix, by rows"""
    first = raw.shape[0] - n_models
    k = 0
    for a in range(first, raw.shape[0]):
        for b in range(a, raw.shape[0]):
            out[k] = _inner(raw[a], raw[b], raw[0], first > 0)
            k += 1


@kernel
def _sum_squares(raw: Raw, coefficients: Numbers, out: F64) -> None:
    """out[0] = squared length of the sum of coefficient times input"""
    first = raw.shape[0] - len(coefficients)
    lanes, totals = np.zeros(LANES, np.float64), np.empty(LANES, np.float64)
    for start in range(0, raw.shape[1], LANES):
        base = raw[0, start : start + LANES]
        totals[:] = 0.0
        for m in range(len(coefficients)):
            tuned = raw[first + m, start : start + LANES]
            for lane in range(len(base)):
                totals[lane] += coefficients[m] * np.float64(_value(tuned[lane], base[lane], first > 0))
        for lane in range(len(base)):
            lanes[lane] += totals[lane] * totals[lane]
    out[0] = lanes.sum()


@kernel
def arc_factors(square_a: float, square_b: float, dot: float, t: float) -> tuple[float, float]:
    """Factors of two vectors on the arc between them, from squared lengths and inner product; see methods.nuslerp"""
    if square_a == 0 or square_b == 0:
        return 1 - t, t
    angle = acos(min(1.0, max(-1.0, dot / (math.sqrt(square_a) * math.sqrt(square_b)))))
    sine = sin(angle)
    if not sine >= NUSLERP_COLINEAR:
        return 1 - t, t
    return sin((1 - t) * angle) / sine, sin(t * angle) / sine


@kernel
def _arc_rows(raw: Raw, first: int, row: int, t: float, out: F32) -> None:
    """raw (source, n), n whole rows: slerp of each row"""
    for start in range(0, raw.shape[1], row):
        stop = start + row
        base, one, other = raw[0, start:stop], raw[first, start:stop], raw[first + 1, start:stop]
        square_a, square_b = _inner(one, one, base, first > 0), _inner(other, other, base, first > 0)
        a, b = arc_factors(square_a, square_b, _inner(one, other, base, first > 0), t)
        into = out[start:stop]
        for i in range(len(into)):
            into[i] = _two(base[i], one[i], other[i], first > 0, a, b)


@kernel
def _two(base: Number, one: Number, other: Number, apart: bool, a: float, b: float) -> np.float32:
    total = a * np.float64(as_f32(one)) + b * np.float64(as_f32(other))
    if apart:
        total += (1.0 - a - b) * np.float64(as_f32(base))
    return np.float32(total)


@kernel
def _column_sums(raw: Raw, first: int, start: int, columns: int) -> F64:
    """raw (source, n) from flat index start -> (3, columns): squared lengths and inner products of the columns"""
    sums = np.zeros((3, columns), np.float64)
    begin = -(start % columns)  # where the row that the first element lies in would begin
    for row in range(begin, raw.shape[1], columns):
        low, high = max(0, -row), min(columns, raw.shape[1] - row)
        base, one, other = (
            raw[0, row + low : row + high],
            raw[first, row + low : row + high],
            raw[first + 1, row + low : row + high],
        )
        aa, bb, ab = sums[0, low:high], sums[1, low:high], sums[2, low:high]
        for i in range(len(base)):
            apart = np.float32(0) if first == 0 else as_f32(base[i])
            a = np.float64(as_f32(one[i]) - apart)
            b = np.float64(as_f32(other[i]) - apart)
            aa[i] += a * a
            bb[i] += b * b
            ab[i] += a * b
    return sums


@kernel
def _combine_columns(raw: Raw, first: int, start: int, factors: F64, out: F32) -> None:
    """factors (2, columns) -> out (n,)"""
    columns = factors.shape[1]
    for row in range(-(start % columns), raw.shape[1], columns):
        low, high = max(0, -row), min(columns, raw.shape[1] - row)
        base, one, other = (
            raw[0, row + low : row + high],
            raw[first, row + low : row + high],
            raw[first + 1, row + low : row + high],
        )
        a, b, into = factors[0, low:high], factors[1, low:high], out[row + low : row + high]
        for i in range(len(into)):
            into[i] = _two(base[i], one[i], other[i], first > 0, a[i], b[i])


@kernel
def _ratio(gram: F64, clamp: bool) -> float:
    """t of model stock from the Gram matrix of the task vectors"""
    n = gram.shape[0]
    total = 0.0
    for a in range(n):
        for b in range(a + 1, n):
            product = math.sqrt(gram[a, a]) * math.sqrt(gram[b, b])
            total += gram[a, b] / product if product > 0 else 0.0
    mean = total / max(1.0, n * (n - 1) / 2)
    divisor = 1 + (n - 1) * mean
    ratio = n * mean / divisor if divisor != 0 else 0.0
    return min(1.0, max(0.0, ratio)) if clamp else ratio


@kernel
def _stock_rows(raw: Raw, row: int, clamp: bool, out: F32) -> None:
    """raw (1 + model, n), n whole rows: model stock of each row"""
    n = raw.shape[0] - 1
    gram = np.empty((n, n), np.float64)
    totals = np.empty(LANES, np.float64)
    for first in range(0, raw.shape[1], row):
        last = first + row
        for a in range(n):
            for b in range(a, n):
                gram[a, b] = _inner(raw[a + 1, first:last], raw[b + 1, first:last], raw[0, first:last], True)
        share = _ratio(gram, clamp) / n
        for start in range(first, last, LANES):
            stop = min(start + LANES, last)
            base, into = raw[0, start:stop], out[start:stop]
            totals[:] = 0.0
            for m in range(n):
                tuned = raw[m + 1, start:stop]
                for lane in range(len(base)):
                    totals[lane] += np.float64(as_f32(tuned[lane])) - np.float64(as_f32(base[lane]))
            for lane in range(len(base)):
                into[lane] = np.float32(np.float64(as_f32(base[lane])) + share * totals[lane])
