"""align: permutation, computed: the order of each module's units that is nearest to the reference.

Weight matching of Git Re-Basin (Ainsworth et al. 2023, arXiv:2209.04836, section 3.2): units are assigned to places so
that the inner products of the weights they are laid on sum to the most. With the residual stream kept as it is every
module is one linear assignment, solved exactly; for attention the query heads are assigned within each pair of KV
groups first, which gives the value of that pair.

Weights are rounded to whole multiples of a power of two, so coarse that every sum of products is a whole number below
2^53. All arithmetic is exact then, and the orders are the same on any machine, in blocks of any size, on any threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from merge.arrays import F64
from merge.checkpoint.reader import SourceReader
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.engine.context import Context
from merge.findings.alignment import BLOCK as ALIGN_BLOCK
from merge.findings.alignment import UNITS as ALIGN_UNITS
from merge.findings.alignment import Member, PermutableModule
from merge.plan import TensorRef

BEFORE_CHECKS = True
Permutation = list[int]  # position -> the stored unit that is put there


def find(context: Context, finding: PermutableModule, tick: Callable[[], None]) -> None:
    """Computes the order of a module's units, journals it, and passes it to the reader."""
    if finding.key not in context.out.notes:
        context.out.keep(finding.key, match(context.reader, finding))
        tick()
    for name, order in zip(finding.order_keys, context.out.notes[finding.key], strict=True):
        context.reader.supply(name, np.asarray(order, np.int64))


def match(reader: SourceReader, units: PermutableModule) -> tuple[Permutation, Permutation]:
    """The best order of the units (neurons, KV groups), and of the query heads within each KV group."""
    scales = [_scale(reader, units, refs) for refs in _sides(units)]
    outer = np.zeros((units.n_units, units.n_units))
    by_head = any(member.by_head for member in units.members)
    inner = np.zeros((units.n_inner, units.n_inner)) if by_head else outer
    for member in units.members:
        if member.reference is not None:
            _subtract_products(reader, member, inner if member.by_head else outer, scales)
    if not by_head:
        order = _assign(outer)
        return order, order
    n = units.per_unit
    within: dict[tuple[int, int], Permutation] = {}
    for g in range(units.n_units):
        for h in range(units.n_units):
            cost = inner[g * n : (g + 1) * n, h * n : (h + 1) * n]
            within[g, h] = _assign(np.ascontiguousarray(cost))
            outer[g, h] += cost[range(n), within[g, h]].sum()
    order = _assign(outer)
    return order, [h * n + head for g, h in enumerate(order) for head in within[g, h]]


def _assign(cost: F64) -> Permutation:
    """The cheapest assignment; of equal ones the one that moves nothing."""
    from scipy.optimize import linear_sum_assignment

    n = len(cost)
    found = linear_sum_assignment(cost)[1]
    if math.fsum(cost.diagonal()) <= math.fsum(cost[range(n), found]):
        return list(range(n))
    return [int(place) for place in found]


# Inner products, in whole numbers.


def _sides(units: PermutableModule) -> tuple[list[TensorRef], list[TensorRef]]:
    """The tensors to compare: the reference's and the source's."""
    compared = [member for member in units.members if member.reference is not None]
    return [m.reference for m in compared if m.reference is not None], [m.source for m in compared]


def _scale(reader: SourceReader, units: PermutableModule, refs: Iterable[TensorRef]) -> float:
    """The power of two that makes these tensors whole numbers whose products over all units sum to less than 2^53."""
    refs = list(refs)
    longest = -(-sum(ref.size for ref in refs) // units.n_units)  # products in a sum
    bits = (52 - math.ceil(math.log2(longest))) // 2
    largest = max((float(np.abs(block).max(initial=0)) for ref in refs for _, block in _rows(reader, ref)), default=0.0)
    exponent = math.frexp(largest)[1] if largest else 0  # largest < 2 ** exponent
    return math.ldexp(1.0, max(-1000, min(1000, bits - exponent)))


def _rows(reader: SourceReader, ref: TensorRef) -> Iterator[tuple[int, F64]]:
    """(first row, rows) of a matrix; of a vector, elements as rows of one."""
    n_rows, columns = _matrix(ref)
    step = max(1, ALIGN_BLOCK // columns)
    for first in range(0, n_rows, step):
        yield first, _read(reader, ref, first, min(step, n_rows - first))


def _matrix(ref: TensorRef) -> tuple[int, int]:
    return ref.shape[0], math.prod(ref.shape[1:])


def _read(reader: SourceReader, ref: TensorRef, first: int, count: int) -> F64:
    """Rows of a matrix, exactly; what is not finite counts as 0 here, and is an error where it is merged."""
    columns = _matrix(ref)[1]
    raw = np.empty(count * columns, DTYPES[ref.dtype].numpy_name)
    reader.read_into(ref, first * columns, raw)
    if ref.dtype == "F64":
        wide = raw
    else:
        narrow = np.empty(len(raw), np.float32)
        to_float32(ref.dtype, raw, narrow)
        wide = narrow.astype(np.float64)
    np.nan_to_num(wide, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return wide.reshape(count, columns)


def _subtract_products(reader: SourceReader, member: Member, cost: F64, scales: list[float]) -> None:
    """cost[i, j] -= the inner product of the reference's unit i and the source's unit j in this tensor."""
    assert member.reference is not None
    n = len(cost)
    width = member.source.shape[member.axis] // n

    def units(ref: TensorRef, scale: float, first: int, count: int) -> F64:
        rows = np.rint(_read(reader, ref, first, count) * scale)
        if member.axis == 0:
            return rows.reshape(count // width, -1)
        return rows.reshape(count, n, width).transpose(1, 0, 2).reshape(n, -1)

    n_rows, columns = _matrix(member.source)
    if member.axis == 1:
        step = max(1, ALIGN_BLOCK // columns)
        for first in range(0, n_rows, step):
            count = min(step, n_rows - first)
            left = units(member.reference, scales[0], first, count)
            right = units(member.source, scales[1], first, count)
            for i in range(0, n, ALIGN_UNITS):
                for j in range(0, n, ALIGN_UNITS):
                    cost[i : i + ALIGN_UNITS, j : j + ALIGN_UNITS] -= (
                        left[i : i + ALIGN_UNITS] @ right[j : j + ALIGN_UNITS].T
                    )
        return
    step = max(1, min(ALIGN_UNITS, ALIGN_BLOCK // (width * columns)))
    for i in range(0, n, step):
        left = units(member.reference, scales[0], i * width, min(step, n - i) * width)
        for j in range(0, n, step):
            right = units(member.source, scales[1], j * width, min(step, n - j) * width)
            cost[i : i + step, j : j + step] -= left @ right.T
