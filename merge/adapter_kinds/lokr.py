"""LoKr: W + s · C ⊗ D, s = alpha / r; C and D may each be a product of two. Yeh et al. (LyCORIS), arXiv:2309.14859."""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, product
from merge.adapter_kinds.patterns import by_pattern
from merge.arrays import F64

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    rank = by_pattern(module.config, "rank_pattern", module.name, "r")
    alpha = by_pattern(module.config, "alpha_pattern", module.name, "alpha")
    first, second = (_shape(module, name) for name in ("lokr_w1", "lokr_w2"))
    made = first[0] * second[0], first[1] * second[1]
    if made != matrix:
        raise ValueError(f"lokr_w1 and lokr_w2: expected factors of {list(matrix)}, found those of {list(made)}")
    return {"scaling": alpha / rank, "made": first[0] * first[1] + second[0] * second[1]}


def _shape(module: AdaptedModule, name: str) -> Shape:
    """Of a factor, given whole or as a product."""
    a, b, whole = (module.shapes.get(f"{name}{end}") for end in ("_a", "_b", ""))
    if whole is not None:
        expect(module, {f"{name}_a": None, f"{name}_b": None})
        made = whole
    elif a is None or b is None or len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise ValueError(f"{name}: expected it whole or as {name}_a and {name}_b of one rank")
    else:
        made = a[0], b[1]
    if len(made) != 2:
        raise ValueError(f"{name}: expected a matrix, found {list(made)}")
    return made


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    first_factor, second_factor = (
        parts[name] if name in parts else product(parts[f"{name}_a"], parts[f"{name}_b"])
        for name in ("lokr_w1", "lokr_w2")
    )

    def change(first: int, values: F64) -> None:
        row = np.arange(first, first + len(values))
        left, right = first_factor[row // len(second_factor)], second_factor[row % len(second_factor)]
        values += settings["scaling"] * (left[:, :, None] * right[:, None, :]).reshape(values.shape)

    return change


def held(settings: Settings, matrix: Shape) -> int:
    return 8 * int(settings["made"])


KIND = Kind(parts=_PARTS, settings=settings, rows=rows, held=held)
