"""adapted: a matrix, or a bias, as an adapter of another kind than LoRA has it (merge/adapter_kinds).

inputs: the matrix (out, in) or the bias (out,), and the adapter's tensors. parameters: `kind`; `parts`, the names of
those tensors; `turned`: the matrix is stored (in, out), so all of it is held; and what the kind has to know.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from merge.adapter_kinds import Rows, Shape, find_kind
from merge.arrays import F32, F64
from merge.chunks import Chunks
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def adapted(
    weight: TensorRef, kind: str, parts: Mapping[str, TensorRef], turned: bool, settings: Mapping[str, object]
) -> TensorRef:
    """The ref of the changed tensor, under the name, dtype and shape of `weight`."""
    parameters = {"kind": kind, "parts": tuple(parts), "turned": turned, **settings}
    return Derived(weight.name, weight.dtype, weight.shape, "adapted", (weight, *parts.values()), parameters)


def prepare(ref: Derived, read: Read) -> Fill:
    (weight, *parts), parameters = ref.inputs, ref.parameters
    values = {name: _read(part, read) for name, part in zip(parameters["parts"], parts, strict=True)}
    matrix = _matrix(ref)
    change = find_kind(parameters["kind"]).rows(values, parameters, matrix)
    if parameters["turned"]:
        return _turned(_read(weight, read).T, change)
    unit, columns = int(parameters.get("unit", 1)), matrix[1]

    def fill(start: int, out: F32) -> None:
        """Computes whole runs of rows, and cuts off the ends that are not needed."""
        first = start // (unit * columns) * unit
        last = -(-(start + len(out)) // (unit * columns)) * unit
        block = np.empty((last - first) * columns, np.float32)
        read(weight, first * columns, block)
        rows = block.astype(np.float64).reshape(-1, columns)
        change(first, rows)
        out[:] = rows.reshape(-1)[start - first * columns :][: len(out)]

    return fill


def _turned(whole: F64, change: Rows) -> Fill:
    rows = np.ascontiguousarray(whole)
    change(0, rows)
    values = rows.T.astype(np.float32).reshape(-1)

    def fill(start: int, out: F32) -> None:
        out[:] = values[start : start + len(out)]

    return fill


def held_bytes(ref: Derived) -> int:
    (_, *parts), parameters = ref.inputs, ref.parameters
    matrix = _matrix(ref)
    kind = find_kind(parameters["kind"])
    kept = 2 * 8 * sum(part.size for part in parts) + kind.held(parameters, matrix)
    if parameters["turned"]:
        return kept + 2 * 8 * ref.size
    # a block as float32 and float64, and as much again for what the kind adds to it
    return kept + (4 + 3 * 8) * max(Chunks.of(ref.shape).length, int(parameters.get("unit", 1)) * matrix[1])


def _matrix(ref: Derived) -> Shape:
    """(out, in); a bias is a column."""
    shape = ref.shape if len(ref.shape) == 2 else (ref.size, 1)
    return shape[::-1] if ref.parameters["turned"] else shape


def _read(ref: TensorRef, read: Read) -> F64:
    values = np.empty(ref.size, np.float32)
    read(ref, 0, values)
    return values.astype(np.float64).reshape(ref.shape)
