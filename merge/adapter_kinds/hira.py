"""HiRA: W + W ∘ (B A), ∘ entry by entry. Huang et al., ICLR 2025 (openreview.net/forum?id=TwJrTz9cRS)."""

from __future__ import annotations

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, product
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    rank = (module.shapes.get("hira_A") or (0,))[0]
    expect(module, {"hira_A": (rank, matrix[1]), "hira_B": (matrix[0], rank)})
    return {}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    def change(first: int, values: F64) -> None:
        values += values * product(parts["hira_B"][first : first + len(values)], parts["hira_A"])

    return change


KIND = Kind(parts=("hira_A", "hira_B"), settings=settings, rows=rows)
