"""Random numbers that are a function of a key and of the element's index: `key`, `distribution`, `scale`.

`distribution` is "normal" (mean 0, standard deviation `scale`) or "uniform" (from -scale to scale). No inputs.
"""

from __future__ import annotations

from merge.arrays import F32
from merge.kernels.random import fill_normal, fill_uniform, split_key
from merge.plan import Derived
from merge.sources import Fill, Read


def prepare(ref: Derived, read: Read) -> Fill:
    parameters = ref.parameters
    draw = fill_normal if parameters["distribution"] == "normal" else fill_uniform
    keys, scale = split_key(parameters["key"]), float(parameters["scale"])

    def fill(start: int, out: F32) -> None:
        draw(start, *keys, scale, out)

    return fill


def held_bytes(ref: Derived) -> int:
    return 0
