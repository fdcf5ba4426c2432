"""(IA)³: each output of a layer, or each input of a feed-forward layer, times a number.

W[i, j] · l[i], and the bias b[i] · l[i]; or W[i, j] · l[j], by the shape of l. Liu et al., arXiv:2205.05638.
"""

from __future__ import annotations

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    scale = module.shapes["ia3_l"]
    if scale == (matrix[0], 1):
        return {"inputs": False, "bias": True}
    if scale == (1, matrix[1]):
        return {"inputs": True}
    raise ValueError(f"ia3_l: expected [{matrix[0]}, 1] or [1, {matrix[1]}], found {list(scale)}")


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    scale = parts["ia3_l"]

    def change(first: int, values: F64) -> None:
        values *= scale if settings["inputs"] else scale[first : first + len(values)]

    return change


KIND = Kind(parts=("ia3_l",), settings=settings, rows=rows)
