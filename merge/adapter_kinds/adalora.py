"""AdaLoRA: W + s · B (E ∘ A), s = alpha / (r + 1e-5); E are singular values, r the rank that training began with.

Zhang et al., arXiv:2303.10512. Ranks that were pruned are not in the file; the scaling stays that of the first rank.
"""

from __future__ import annotations

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, number, product
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    rank = (module.shapes.get("lora_A") or (0,))[0]
    expect(module, {"lora_A": (rank, matrix[1]), "lora_E": (rank, 1), "lora_B": (matrix[0], rank)})
    alpha, first = number(module.config, "lora_alpha", 8), number(module.config, "init_r", 12)
    return {"scaling": (alpha if alpha > 0 else first) / (first + 1e-5)}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    right = settings["scaling"] * parts["lora_E"] * parts["lora_A"]

    def change(first: int, values: F64) -> None:
        values += product(parts["lora_B"][first : first + len(values)], right)

    return change


KIND = Kind(parts=("lora_A", "lora_E", "lora_B"), settings=settings, rows=rows)
