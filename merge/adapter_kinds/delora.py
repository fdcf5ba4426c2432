"""DeLoRA: W + B diag(λ / (r ‖A_k‖ ‖B_k‖)) A diag(n), n the lengths of W's columns when training began.

Bini et al., arXiv:2503.18225. A_k are the rows of A and B_k the columns of B; lengths count as 1e-4 at least.
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, product
from merge.arrays import F64

_PARTS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    rank = (module.shapes.get("delora_A") or (0,))[0]
    shapes = ((rank, matrix[1]), (matrix[0], rank), (1,), (matrix[1],))
    expect(module, dict(zip(_PARTS, shapes, strict=True)))
    return {}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    a, b, strength, norms = (parts[name] for name in _PARTS)
    lengths = np.maximum(np.sqrt((a * a).sum(1)), 1e-4) * np.maximum(np.sqrt((b * b).sum(0)), 1e-4)
    left, right = b * (strength / len(a) / lengths), a * norms

    def change(first: int, values: F64) -> None:
        values += product(left[first : first + len(values)], right)

    return change


KIND = Kind(parts=_PARTS, settings=settings, rows=rows)
