"""A tensor with normal noise of standard deviation `scale` added; the noise is a function of `key` and the index."""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.kernels.random import fill_normal, split_key
from merge.plan import Derived
from merge.sources import Fill, Read


def prepare(ref: Derived, read: Read) -> Fill:
    (source,) = ref.inputs
    keys, scale = split_key(ref.parameters["key"]), float(ref.parameters["scale"])

    def fill(start: int, out: F32) -> None:
        noise = np.empty(len(out), np.float32)
        fill_normal(start, *keys, scale, noise)
        read(source, start, out)
        out += noise

    return fill


def held_bytes(ref: Derived) -> int:
    from merge.chunks import Chunks

    return 4 * min(ref.size, Chunks.of(ref.shape).length)
