"""Reads the statistics of a step: Gram matrices and Fisher information, which are as large as the weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from merge.checkpoint.reader import SourceReader
from merge.errors import NumbersError
from merge.plan import Step


def read_statistics(reader: SourceReader, step: Step) -> list[npt.NDArray[np.float32]]:
    """One array (*shape) for each input, in order; [] for a step without statistics.

    Raises:
        NumbersError: NaN or infinite values, which no leniency allows.
    """
    arrays = []
    for ref in step.statistics:
        flat = np.empty(ref.size, np.float32)
        reader.read_into(ref, 0, flat)
        if not np.isfinite(flat).all():
            raise NumbersError(f"{ref.file}: {ref.name}: NaN or infinite values. Make the statistics again.")
        arrays.append(flat.reshape(ref.shape))
    return arrays


def digests(arrays: list[npt.NDArray[np.float32]]) -> dict[str, object]:
    """Their entry in the manifest."""
    return {"statistics": [xxhash.xxh3_128_hexdigest(array.data) for array in arrays]} if arrays else {}
