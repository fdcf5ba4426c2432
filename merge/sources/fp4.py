"""fp4: FP4 (E2M1) numbers times scales, each of a group of a row: MXFP4 and NVFP4.

inputs: the packed codes as bytes, the first of two in the low bits; the scales; where `overall` says so, one number for
the whole weight. parameters:
    group: numbers of one scale.
    overall: "" none; "divide" or "multiply": what the scales are to be done with by that number (NVFP4).
    transposed: the weight is a stack of matrices, each stored transposed (gpt-oss); one packed matrix is held.

Scales that are stored as U8 are exponents (E8M0): 2^(s - 127), 255 is NaN. value = number * scale, rounded to float32.
Source: OCP Microscaling Formats 1.0, sections 5.2, 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.chunks import Chunks
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read
from merge.unpack import E2M1, TABLE_PIECE, by_units, byte_table, look_up

U8 = npt.NDArray[np.uint8]
_KEPT = 2  # packed matrices of a stack: threads that share a tensor are near each other
EXPONENTS: F32 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def fp4(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    codes: TensorRef,
    scale: TensorRef,
    group: int,
    *,
    overall: str = "",
    more: tuple[TensorRef, ...] = (),
    transposed: bool = False,
) -> Derived:
    parameters = {"group": group, "overall": overall, "transposed": transposed}
    return Derived(name, dtype, shape, "fp4", (codes, scale, *more), parameters, how="decoded")


def prepare(ref: Derived, read: Read) -> Fill:
    scales = _scales(ref, read)
    if ref.parameters["transposed"]:
        return _Stack(ref, read, scales).fill
    codes, group = ref.inputs[0], ref.parameters["group"]
    table = byte_table(E2M1)

    def decode(first: int, last: int, out: F32) -> None:
        """Groups first .. last - 1."""
        raw = np.empty(len(out) // 2, np.uint8)
        read(codes, first * group // 2, raw)
        look_up(table, raw, out)
        with np.errstate(over="ignore", invalid="ignore"):  # counted later, with everything that is not finite
            rows = out.reshape(-1, group)
            rows *= scales(first, last)[:, None]

    return lambda start, out: by_units(start, out, group, ref.size, decode)


def _scales(ref: Derived, read: Read) -> Callable[[int, int], F32]:
    """scales(first, last) -> float32 scales of groups first .. last - 1, counted through the whole weight."""
    part, overall = ref.inputs[1], ref.parameters["overall"]
    number = np.ones(1, np.float32)
    if overall:
        read(ref.inputs[2], 0, number)

    def scales(first: int, last: int) -> F32:
        values = np.empty(last - first, np.float32)
        if part.dtype == "U8":
            raw = np.empty(last - first, np.uint8)
            read(part, first, raw)
            np.take(EXPONENTS, raw, out=values, mode="clip")
            return values
        read(part, first, values)
        with np.errstate(all="ignore"):
            if overall == "divide":
                values /= number
            elif overall == "multiply":
                values *= number
        return values

    return scales


class _Stack:
    """Matrices [rows, columns] of a stack, each stored as [columns, rows]."""

    def __init__(self, ref: Derived, read: Read, scales: Callable[[int, int], F32]) -> None:
        *_, self._rows, self._columns = ref.shape
        self._ref, self._read, self._scales = ref, read, scales
        self._group = ref.parameters["group"]
        self._table = byte_table(E2M1)
        self._held: dict[int, tuple[U8, F32]] = {}
        self._lock = threading.Lock()

    def fill(self, start: int, out: F32) -> None:
        by_units(start, out, self._columns, self._ref.size, self._decode)

    def _decode(self, first: int, last: int, out: F32) -> None:
        """Rows first .. last - 1 of all matrices, one after another."""
        values = out.reshape(last - first, self._columns)
        row = first
        while row < last:
            matrix, inner = divmod(row, self._rows)
            stop = min(last, (matrix + 1) * self._rows)
            self._part(matrix, inner, values[row - first : stop - first])
            row = stop

    def _part(self, matrix: int, row: int, out: F32) -> None:
        """out (n, columns): rows row .. row + n of one matrix"""
        packed, scales = self._matrix(matrix)
        begin, end = row // self._group, -(-(row + len(out)) // self._group)
        raw = np.ascontiguousarray(packed[:, begin:end]).reshape(-1)
        values = np.empty(2 * len(raw), np.float32)
        look_up(self._table, raw, values)
        with np.errstate(over="ignore", invalid="ignore"):
            groups = values.reshape(self._columns, end - begin, self._group)
            groups *= scales[:, begin:end, None]
        inner = row - begin * self._group
        out[:] = values.reshape(self._columns, -1)[:, inner : inner + len(out)].T

    def _matrix(self, number: int) -> tuple[U8, F32]:
        """Its codes (columns, groups, bytes of a group) and scales (columns, groups)."""
        with self._lock:
            found = self._held.get(number)
            if found is None:
                while len(self._held) >= _KEPT:
                    del self._held[next(iter(self._held))]
                groups = self._rows // self._group
                n = self._columns * groups
                packed: npt.NDArray[Any] = np.empty(n * self._group // 2, np.uint8)
                self._read(self._ref.inputs[0], number * len(packed), packed)
                scales = self._scales(number * n, (number + 1) * n)
                found = packed.reshape(self._columns, groups, -1), scales.reshape(self._columns, groups)
                self._held[number] = found
            return found


def rounding(ref: Derived) -> float:
    return 0.115 if ref.inputs[1].dtype == "U8" else 0.095  # exponents as scales, or scales of 8 bits


def held_bytes(ref: Derived) -> int:
    chunk, group = Chunks.of(ref.shape).length, int(ref.parameters["group"])
    if not ref.parameters["transposed"]:
        return 5 * chunk + 8 * (chunk // group) + 8 * TABLE_PIECE
    matrix = math.prod(ref.shape[-2:])
    panel = 5 * (chunk + 2 * group * ref.shape[-1]) + 4 * chunk
    return _KEPT * (matrix // 2 + 5 * (matrix // group)) + panel + 8 * TABLE_PIECE
