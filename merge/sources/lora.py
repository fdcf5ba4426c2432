"""A matrix with a LoRA adapter folded in: W + s·B·A, and for DoRA m · (W + s·B·A) / ‖W + s·B·A‖.

inputs: the matrix, A (rank, in), B (out, rank) and, for DoRA, m. parameters: `scaling` s; `transposed`: the matrix is
stored (in, out), as embeddings and GPT-2's Conv1D are, so that (B·A)^T is added. DoRA's norms are those of the weights
of each output: of rows, of columns where transposed.

Sources: Hu et al., arXiv:2106.09685; Liu et al., arXiv:2402.09353, eq. 5; peft 0.21.2, tuners/lora/variants.py.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.chunks import Chunks
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read, any_range, matrix


def fold(
    weight: TensorRef, a: TensorRef, b: TensorRef, scaling: float, transposed: bool, magnitude: TensorRef | None
) -> TensorRef:
    """The ref of the folded matrix, under the name, dtype and shape of `weight`."""
    inputs = (weight, a, b) if magnitude is None else (weight, a, b, magnitude)
    parameters = {"scaling": scaling, "transposed": transposed}
    return Derived(weight.name, weight.dtype, weight.shape, "lora", inputs, parameters)


def prepare(ref: Derived, read: Read) -> Fill:
    from merge.kernels import fold as kernels

    weight, a, b, *magnitude = ref.inputs
    scaling, transposed = float(ref.parameters["scaling"]), bool(ref.parameters["transposed"])
    down, up = matrix(a, read), matrix(b, read)
    left, right = (down.T, up.T) if transposed else (up, down)
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    columns = ref.shape[1]

    def plain(start: int, out: F32) -> None:
        """Whole rows."""
        read(weight, start, out)
        row = start // columns
        block = out.reshape(-1, columns)
        kernels.add_product(left[row : row + len(block)], right, scaling, block)

    if not magnitude:
        return any_range(plain, columns)
    lengths = np.empty(magnitude[0].size, np.float32)
    read(magnitude[0], 0, lengths)

    if transposed:
        squares = np.zeros(columns, np.float64)
        chunks = Chunks.of(ref.shape)
        for chunk in range(chunks.count):
            start, stop = chunks.span(chunk)
            values = np.empty(stop - start, np.float32)
            plain(start, values)
            kernels.add_column_squares(values.reshape(-1, columns), squares)
        factor = lengths / np.sqrt(squares)

        def columns_scaled(start: int, out: F32) -> None:
            plain(start, out)
            kernels.scale_columns(factor, out.reshape(-1, columns))

        return any_range(columns_scaled, columns)

    def rows_scaled(start: int, out: F32) -> None:
        plain(start, out)
        kernels.scale_rows(lengths, start // columns, out.reshape(-1, columns))

    return any_range(rows_scaled, columns)


def held_bytes(ref: Derived) -> int:
    factors = sum(each.size for each in ref.inputs[1:])
    # the factors as float32, twice while they are turned; raw bytes of one; a block for the norms of columns
    return 3 * 4 * factors + 2 * 4 * Chunks.of(ref.shape).length
