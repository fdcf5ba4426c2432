"""low_rank: scaling · B A, the change that a LoRA adapter makes to one matrix.

inputs: A (rank, in), B (out, rank); or none, for an adapter that leaves the matrix as it is. parameters: scaling.
Shape (out, in), as the factors have it: an embedding's change is (width, vocabulary), that of a Conv1D (out, in).
"""

from __future__ import annotations

from merge.arrays import F32
from merge.plan import Derived
from merge.sources import Fill, Read, any_range, matrix


def prepare(ref: Derived, read: Read) -> Fill:
    from merge.kernels.fold import add_product

    if not ref.inputs:
        return lambda start, out: out.fill(0)
    a, b = (matrix(part, read) for part in ref.inputs)
    scaling, columns = float(ref.parameters["scaling"]), ref.shape[1]

    def rows(start: int, out: F32) -> None:
        out.fill(0)
        block = out.reshape(-1, columns)
        add_product(b[start // columns :][: len(block)], a, scaling, block)

    return any_range(rows, columns)


def held_bytes(ref: Derived) -> int:
    """The factors; rows that are cut would take their own size as well, but no block of a matrix cuts any."""
    return sum(4 * part.size for part in ref.inputs)
