"""VeRA: W + (λ_b ∘ B) (λ_d ∘ A); B and A are random, shared by all modules and cut to each one's size.

Kopiczko et al., arXiv:2310.11454.
"""

from __future__ import annotations

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, product
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    a, b = module.shapes.get("vera_A"), module.shapes.get("vera_B")
    if a is None or b is None:
        raise ValueError(
            "vera_A and vera_B are not in the file (save_projection: false), and can only be drawn again where it was "
            "trained. Save it with save_projection=True"
        )
    rank = a[0]
    expect(module, {"vera_lambda_b": (matrix[0],), "vera_lambda_d": (rank,)})
    if a[1] < matrix[1] or b[0] < matrix[0] or b[1] != rank:
        raise ValueError(f"vera_A {list(a)} and vera_B {list(b)} are too small for a matrix of {list(matrix)}")
    return {}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    left = parts["vera_lambda_b"][:, None] * parts["vera_B"][: matrix[0]]
    right = parts["vera_lambda_d"][:, None] * parts["vera_A"][:, : matrix[1]]

    def change(first: int, values: F64) -> None:
        values += product(left[first : first + len(values)], right)

    return change


KIND = Kind(parts=("vera_lambda_b", "vera_lambda_d"), settings=settings, rows=rows, shared=("vera_A", "vera_B"))
