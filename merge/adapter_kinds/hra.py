"""HRA: W H₁ ... H_r, each H = I - 2 u u^T a reflection. Yuan et al., arXiv:2405.17484.

With apply_GS the directions are first made orthogonal to each other (Gram-Schmidt, in their order).
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape = module.shapes["hra_u"]
    if len(shape) != 2 or shape[0] != matrix[1]:
        raise ValueError(f"hra_u: expected [{matrix[1]}, r], found {list(shape)}")
    return {"orthogonal": bool(module.config.get("apply_GS"))}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    from merge.kernels.rotate import reflect

    directions = np.ascontiguousarray(parts["hra_u"].T)
    for i, direction in enumerate(directions):
        for earlier in directions[:i] if settings["orthogonal"] else ():
            direction -= (earlier * direction).sum() * earlier
        direction /= np.sqrt((direction * direction).sum())

    def change(first: int, values: F64) -> None:
        reflect(values, directions)

    return change


KIND = Kind(parts=("hra_u",), settings=settings, rows=rows)
