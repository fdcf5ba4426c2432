"""RoAd: pairs of outputs are rotated and stretched, R W and R b. Liao and Monz, arXiv:2409.00119, eq. 4.

In each group of outputs the first half is paired with the second: y = x ∘ α cos θ + rotated(x) ∘ α sin θ. The variants
differ in how many angles and lengths there are: one for a pair (road_1), for an output (road_2), or two (road_4).
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, number
from merge.arrays import F64
from merge.quoting import quoted

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    variant, group = module.config.get("variant", "road_1"), int(number(module.config, "group_size", 64))
    if variant not in _SIZES:
        raise ValueError(f"variant: expected one of {', '.join(_SIZES)}, found {quoted(variant, 40)}")
    if group < 2 or group % 2 or matrix[0] % group:
        raise ValueError(f"group_size: {group} does not divide {matrix[0]} outputs into groups of pairs")
    size = (int(_SIZES[variant] * matrix[0]),)
    expect(module, {"road_theta": size, "road_alpha": size})
    return {"variant": variant, "unit": group, "bias": True}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    group: int = settings["unit"]
    angles, lengths = (_two(parts[name], settings["variant"], group) for name in ("road_theta", "road_alpha"))
    straight, across = lengths[0] * np.cos(angles[0]), lengths[1] * np.sin(angles[1])

    def change(first: int, values: F64) -> None:
        halves = values.reshape(-1, 2, group // 2, values.shape[1])
        rotated = np.stack((-halves[:, 1], halves[:, 0]), axis=1).reshape(values.shape)
        some = slice(first, first + len(values))
        values *= straight[some, None]
        values += across[some, None] * rotated

    return change


def _two(numbers: F64, variant: str, group: int) -> tuple[F64, F64]:
    """For each output, the factors of its cosine and of its sine."""
    if variant == "road_4":
        both = numbers.reshape(-1, 2, group)
        return both[:, 0].reshape(-1), both[:, 1].reshape(-1)
    each = numbers.reshape(-1, group // 2).repeat(2, axis=0).reshape(-1) if variant == "road_1" else numbers
    return each, each


KIND = Kind(parts=("road_theta", "road_alpha"), settings=settings, rows=rows, bitwise=False)
