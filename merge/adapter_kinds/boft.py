"""BOFT: diag(s) W R^T, R of orthogonal blocks along the inputs (the Cayley transforms of skew matrices).

Liu et al., arXiv:2311.06243. With more than one butterfly factor PEFT itself needs its CUDA extension; refused here.
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect
from merge.adapter_kinds.oft import cayley
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape = module.shapes.get("boft_R", ())
    expect(module, {"boft_s": (matrix[0], 1)})
    if len(shape) != 4 or shape[2] != shape[3] or shape[1] * shape[2] != matrix[1]:
        raise ValueError(f"boft_R: expected square blocks along {matrix[1]} inputs, found {list(shape)}")
    if shape[0] != 1:
        raise ValueError(f"boft_R: {shape[0]} butterfly factors, which PEFT can fold only on CUDA. Fold it there")
    return {"size": shape[2]}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    from merge.kernels.rotate import rotate

    blocks, scale = parts["boft_R"][0], parts["boft_s"]
    turned = np.ascontiguousarray(cayley(0.5 * (blocks - blocks.transpose(0, 2, 1))))

    def change(first: int, values: F64) -> None:
        rotate(values, turned)
        values *= scale[first : first + len(values)]

    return change


def held(settings: Settings, matrix: Shape) -> int:
    return 5 * 8 * matrix[1] * int(settings["size"])


KIND = Kind(parts=("boft_R", "boft_s"), settings=settings, rows=rows, held=held, bitwise=False)
