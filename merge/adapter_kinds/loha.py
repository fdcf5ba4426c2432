"""LoHa: W + s · (A₁ B₁) ∘ (A₂ B₂), s = alpha / r, ∘ entry by entry. Hyeon-Woo et al. (FedPara), arXiv:2108.06098."""

from __future__ import annotations

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, product
from merge.adapter_kinds.patterns import by_pattern
from merge.arrays import F64

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    rank = by_pattern(module.config, "rank_pattern", module.name, "r")
    alpha = by_pattern(module.config, "alpha_pattern", module.name, "alpha")
    left, right = (matrix[0], int(rank)), (int(rank), matrix[1])
    expect(module, dict(zip(_PARTS, (left, right, left, right), strict=True)))
    return {"scaling": alpha / rank}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    a1, b1, a2, b2 = (parts[name] for name in _PARTS)

    def change(first: int, values: F64) -> None:
        some = slice(first, first + len(values))
        values += settings["scaling"] * product(a1[some], b1) * product(a2[some], b2)

    return change


KIND = Kind(parts=_PARTS, settings=settings, rows=rows)
