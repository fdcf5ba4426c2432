"""Compares the values of two stored tensors; planning needs this for tied heads."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.plan import SourceFile, TensorRef

_BLOCK = 1 << 20  # elements


def same_numbers(a: TensorRef, b: TensorRef, files: Iterable[SourceFile]) -> bool:
    """Reads both up to the first difference. Derived tensors are equal only if they are the same one.

    Raises:
        CheckpointError, SourceChanged: they cannot be read.
    """
    if a.named("") == b.named(""):
        return True
    if a.shape != b.shape or a.is_computed or b.is_computed:
        return False
    raw = a.dtype == b.dtype and a.is_exact and b.is_exact
    if not raw and not (DTYPES[a.dtype].is_float and DTYPES[b.dtype].is_float):
        return False
    dtype = DTYPES[a.dtype].numpy_name if raw else "float32"
    with SourceReader(files) as reader:
        for start in range(0, a.size, _BLOCK):
            found = []
            for ref in (a, b):
                values = np.empty(min(_BLOCK, a.size - start), dtype)
                if raw:
                    reader.read_into(ref, start, values)
                else:
                    reader.read_values(ref, start, values)
                found.append(values.view(f"u{values.itemsize}"))  # as bits, so that NaN equals itself
            if not np.array_equal(found[0], found[1]):
                return False
    return True
