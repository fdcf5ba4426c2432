"""Steps that make a factor of a combined adapter: what their plan says, without the numbers."""

from __future__ import annotations

import math

from merge.derive import held_bytes
from merge.plan import Step

SUMS = ("cat", "svd", "linear", "task_arithmetic")  # weighted sums of changes: no entry of a matrix is needed
GROUP = 16  # modules whose A are computed before their B, so that threads do not wait for each other's halves


def rank_of(step: Step) -> int:
    return step.shape[0 if step.factor == "A" else -1]


def ranks_in(step: Step) -> list[int]:
    """The rank of each adapter's change, 0 where it makes none."""
    return [ref.derived.inputs[0].shape[0] if ref.derived and ref.derived.inputs else 0 for ref in step.inputs]


def is_exact(step: Step) -> bool:
    """Whether the factors are those of the adapters side by side."""
    return step.method in SUMS and step.method != "svd" and rank_of(step) == sum(ranks_in(step))


def factor_bytes(step: Step) -> int:
    """Bytes that computing the factors of a step's module takes, with what waits for its own step."""
    rows, columns = step.inputs[0].shape
    total, rank, n = sum(ranks_in(step)), rank_of(step), len(step.inputs)
    waiting = 4 * GROUP * rank * max(rows, columns)
    stacked = 8 * total * (rows + columns)
    if step.method in SUMS:
        return waiting + stacked * (2 if is_exact(step) else 6)
    if step.method == "knots":
        return waiting + 4 * stacked + 8 * total * columns * (5 * n + 3)
    side = min(rows, columns)
    dense = rows * columns * (4 * (3 * n + 2) + 8 * 6) + 8 * 4 * side * side
    return waiting + 2 * stacked + dense + max(held_bytes(ref) for ref in step.inputs)


def weights(step: Step) -> tuple[float, ...]:
    """The factor of each adapter's change in a weighted sum."""
    from merge.kernels.weights import divisor

    own: tuple[float, ...] = step.parameters["weight"]
    if step.method == "linear":
        by = math.fsum(own) if step.parameters.get("normalize", True) else 1.0
    else:
        by = divisor(own, step.parameters.get("normalize", False))
    return tuple(weight * (step.parameters.get("lambda", 1.0) / by) for weight in own)
