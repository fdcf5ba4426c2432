"""VB-LoRA: W + B A; each piece of A and B is a mixture of the top k vectors of a bank that all modules share.

Li, Han and Ji, arXiv:2405.15179. The weights of a mixture are the softmax of its k largest logits.
"""

from __future__ import annotations

import numpy as np

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, expect, number, product
from merge.arrays import F64

_BANK = "vblora_vector_bank"


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    bank, logits = module.shapes.get(_BANK, ()), module.shapes.get("vblora_logits_A", (0,))
    if module.config.get("save_only_topk_weights"):
        raise ValueError("save_only_topk_weights: logits that are not saved are not read here. Save it without")
    if len(bank) != 2 or matrix[0] % bank[1] or matrix[1] % bank[1]:
        raise ValueError(f"{_BANK}: vectors {list(bank)} do not divide a matrix of {list(matrix)}")
    rank = logits[0]
    tiles = (rank, matrix[1] // bank[1], bank[0]), (matrix[0] // bank[1], rank, bank[0])
    expect(module, {"vblora_logits_A": tiles[0], "vblora_logits_B": tiles[1]})
    return {"top": int(number(module.config, "topk", 2))}


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    a, b = (_mixed(parts[f"vblora_logits_{each}"], parts[_BANK], settings["top"]) for each in "AB")
    right = a.reshape(a.shape[0], -1)  # (r, tiles, length) -> (r, in)
    left = b.transpose(0, 2, 1).reshape(matrix[0], -1)  # (tiles, r, length) -> (out, r)

    def change(first: int, values: F64) -> None:
        values += product(left[first : first + len(values)], right)

    return change


def _mixed(logits: F64, bank: F64, top: int) -> F64:
    """logits (x, y, vectors), bank (vectors, length) -> (x, y, length)"""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top]
    best = np.take_along_axis(logits, chosen, axis=-1)
    weights = np.exp(best - best[..., :1])
    weights /= weights.sum(-1, keepdims=True)
    made = np.zeros((*logits.shape[:2], bank.shape[1]))
    for k in range(top):
        made += weights[..., k, None] * bank[chosen[..., k]]
    return made


KIND = Kind(parts=("vblora_logits_A", "vblora_logits_B"), settings=settings, rows=rows, shared=(_BANK,), bitwise=False)
