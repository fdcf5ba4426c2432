"""Rounding errors of a conversion by kind of tensor, from its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.architecture.tensor_kinds import KINDS, kind_of


@dataclass(frozen=True)
class Rounding:
    """Counts and relative errors over all tensors of a kind.

    Attributes:
        changed: numbers that the new dtype does not hold exactly.
        underflow: of those, numbers that became zero.
        overflow: numbers that became infinite.
        largest: largest relative change of a number that became neither.
        rms: root of the mean square of the changes over that of the numbers.
    """

    kind: str
    tensors: int
    numbers: int
    changed: int
    underflow: int
    overflow: int
    largest: float
    rms: float


def rounding_of(manifest: Mapping[str, Any]) -> list[Rounding]:
    """One entry for each kind that has tensors whose dtype changed, and one for "all" of them; [] if there are none."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, tensor in manifest["tensors"].items():
        if "rounding" in tensor:
            groups.setdefault(kind_of(name), []).append(tensor)
    ordered = [(kind, groups[kind]) for kind in KINDS if kind in groups]
    if len(ordered) > 1:
        ordered.append(("all", [tensor for _, group in ordered for tensor in group]))
    return [_sum(kind, group) for kind, group in ordered]


def _sum(kind: str, tensors: list[Mapping[str, Any]]) -> Rounding:
    parts = [tensor["rounding"] for tensor in tensors]
    before = math.fsum(part["squares"] for part in parts)
    return Rounding(
        kind=kind,
        tensors=len(tensors),
        numbers=sum(math.prod(tensor["shape"]) for tensor in tensors),
        changed=sum(part["changed"] for part in parts),
        underflow=sum(part["underflow"] for part in parts),
        overflow=sum(tensor.get("overflow", 0) for tensor in tensors),
        largest=max(part["largest"] for part in parts),
        rms=math.sqrt(math.fsum(part["lost"] for part in parts) / before) if before else 0.0,
    )
