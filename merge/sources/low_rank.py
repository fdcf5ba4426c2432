"""low_rank: scaling · B A, the change that a LoRA adapter makes to one matrix.

inputs: A (rank, in), B (out, rank); or none, for an adapter that leaves the matrix as it is. parameters: scaling.
Shape (out, in), as the factors have it: an embedding's change is (width, vocabulary), that of a Conv1D (out, in).
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read


def prepare(ref: Derived, read: Read) -> Fill:
    from merge.kernels.fold import add_product

    if not ref.inputs:
        return lambda start, out: out.fill(0)
    a, b = (_matrix(part, read) for part in ref.inputs)
    scaling, columns = float(ref.parameters["scaling"]), ref.shape[1]

    def fill(start: int, out: F32) -> None:
        stop = start + len(out)
        if start % columns == 0 and stop % columns == 0:  # whole rows, as blocks of matrices are
            out.fill(0)
            add_product(b[start // columns : stop // columns], a, scaling, out.reshape(-1, columns))
            return
        first, last = start // columns, -(-stop // columns)
        rows = np.zeros((last - first, columns), np.float32)
        add_product(b[first:last], a, scaling, rows)
        out[:] = rows.reshape(-1)[start - first * columns : stop - first * columns]

    return fill


def held_bytes(ref: Derived) -> int:
    """The factors; rows that are cut would take their own size as well, but no block of a matrix cuts any."""
    return sum(4 * part.size for part in ref.inputs)


def _matrix(ref: TensorRef, read: Read) -> F32:
    values = np.empty(ref.size, np.float32)
    read(ref, 0, values)
    return values.reshape(ref.shape)
