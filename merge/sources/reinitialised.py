"""A matrix of an MLP in which some neurons are redrawn at random: Drop-Upcycling's partial re-initialisation.

Source: Nakamura et al. 2025, "Drop-Upcycling" (arXiv:2502.19261), section 3.2. floor(ratio * n) of the n neurons are
chosen at random, the same ones in all matrices of an expert's MLP; their entries are replaced by normal numbers of the
mean and standard deviation that these entries have in this matrix.

Parameters: `neurons`, the key of the choice; `key`, that of the numbers; `axis`, along which neurons lie; `ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.chunks import Chunks
from merge.kernels.random import fill_normal, split_key
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

Mask = Callable[[int, int], npt.NDArray[np.bool_]]  # (start, n) -> (n,): which of these elements are new


def chosen(key: int, n: int, ratio: float) -> npt.NDArray[np.bool_]:
    """(n,): the floor(ratio * n) neurons whose random numbers are smallest; of equal ones those that come first."""
    drawn = np.empty(n, np.float32)
    fill_normal(0, *split_key(key), 1.0, drawn)
    mask = np.zeros(n, np.bool_)
    mask[np.argsort(drawn, kind="stable")[: math.floor(ratio * n)]] = True
    return mask


def prepare(ref: Derived, read: Read) -> Fill:
    (source,) = ref.inputs
    parameters = ref.parameters
    columns = ref.shape[1]
    mask = chosen(parameters["neurons"], ref.shape[parameters["axis"]], parameters["ratio"])
    keys = split_key(parameters["key"])

    def replaced(start: int, n: int) -> npt.NDArray[np.bool_]:
        index = np.arange(start, start + n)
        return mask[index // columns if parameters["axis"] == 0 else index % columns]

    mean, deviation = _moments(ref, source, read, replaced) if mask.any() else (0.0, 0.0)

    def fill(start: int, out: F32) -> None:
        new = np.empty(len(out), np.float32)
        fill_normal(start, *keys, deviation, new)
        read(source, start, out)
        np.copyto(out, new + np.float32(mean), where=replaced(start, len(out)))

    return fill


def _moments(ref: TensorRef, source: TensorRef, read: Read, replaced: Mask) -> tuple[float, float]:
    """Mean and standard deviation of the entries that are replaced: sums of chunks, added exactly."""
    chunks = Chunks.of(ref.shape)
    buffer = np.empty(chunks.length, np.float32)
    sums, squares, n = [], [], 0
    for chunk in range(chunks.count):
        start, stop = chunks.span(chunk)
        block = buffer[: stop - start]
        read(source, start, block)
        values = block[replaced(start, stop - start)].astype(np.float64)
        sums.append(float(values.sum()))
        squares.append(float((values * values).sum()))
        n += len(values)
    mean = math.fsum(sums) / n
    return mean, math.sqrt(max(0.0, math.fsum(squares) / n - mean * mean))


def held_bytes(ref: Derived) -> int:
    # A chunk of new numbers, its indices and mask; the neurons.
    return 32 * min(ref.size, Chunks.of(ref.shape).length) + 16 * max(ref.shape)
