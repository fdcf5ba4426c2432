"""The order of a module's units that is nearest to the reference model; computed by merge.jobs.alignment.find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.plan import Finding, Plan, TensorRef

FINDER = "merge.jobs.alignment.find"
BLOCK = 1 << 20  # elements of one tensor that are compared at a time, as float64
UNITS = 2048  # units that are compared at a time
_SCIPY = 80 << 20  # with the buffers of matrix products


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a module whose units can be permuted, along `axis`.

    `by_head`: the axis holds the query heads of each KV group, one after another. A tensor without a reference is
    permuted with the others but not compared.
    """

    source: TensorRef
    reference: TensorRef | None
    axis: int
    by_head: bool


@dataclass(frozen=True, slots=True)
class PermutableModule(Finding):
    """A module of a model whose units (neurons, or KV groups of `per_unit` query heads) are permuted."""

    key: str
    module: str
    kind: str  # "mlp" or "attention"
    model: int  # in Plan.models
    n_units: int
    per_unit: int
    members: tuple[Member, ...]
    finder: str = "alignment"

    @property
    def n_inner(self) -> int:
        return self.n_units * self.per_unit

    @property
    def order_keys(self) -> tuple[str, str]:
        """The keys of the orders: of the units, and of the heads within them."""
        return f"{self.key} units", f"{self.key} inner units"

    @property
    def bytes_read(self) -> int:
        return 0  # the steps read them again

    @property
    def what(self) -> str:
        return "its models are aligned first"

    def held_bytes(self, threads: int) -> int:
        """Bytes for the costs of all pairs of units, scipy and blocks."""
        costs = self.n_inner**2 + self.n_units**2 * (self.per_unit > 1)
        return _SCIPY + 8 * (costs + 6 * BLOCK + UNITS**2)

    @classmethod
    def summary(cls, plan: Plan, notes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each model and kind of module: how many units there are, and how many moved."""
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for units in (each for each in plan.findings if isinstance(each, cls)):
            entry = found.setdefault(
                (units.model, units.kind),
                {"model": plan.models[units.model].ref, "kind": units.kind, "layers": 0, "units": 0, "moved": 0},
            )
            _, inner = notes[units.key]
            entry["layers"] += 1
            entry["units"] += len(inner)
            entry["moved"] += sum(place != unit for place, unit in enumerate(inner))
        return [found[key] for key in sorted(found)]


FINDING = PermutableModule
