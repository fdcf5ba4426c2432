"""Steps that make a factor of a combined adapter: what their plan says, without the numbers."""

from __future__ import annotations

import math
from dataclasses import replace

from merge.derive import held_bytes
from merge.methods import get_method
from merge.plan import Derived, Step

SUMS = ("cat", "svd", "linear", "task_arithmetic")  # weighted sums of changes: no entry of a matrix is needed
SECONDS_EACH, SECONDS_RANK = 0.5, 2.0  # for 4096 x 4096: an adapter's change in the method, the SVD for rank 32
GROUP = 16  # modules whose A are computed before their B, so that threads do not wait for each other's halves


def rank_of(step: Step) -> int:
    return step.shape[0 if step.factor == "A" else -1]


def ranks_in(step: Step) -> list[int]:
    """The rank of each adapter's change, 0 where it makes none."""
    return [ref.derived.inputs[0].shape[0] if ref.derived and ref.derived.inputs else 0 for ref in step.inputs]


def is_exact(step: Step) -> bool:
    """Whether the factors are those of the adapters side by side."""
    return step.method in SUMS and step.method != "svd" and rank_of(step) == sum(ranks_in(step))


def is_dense(step: Step) -> bool:
    """Whether the method needs every entry of the changes."""
    return step.method not in (*SUMS, "knots")


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
    method = get_method(step.method)
    definition = 0 if method is not None and method.fused else 4 * (3 * n + 2)  # without a kernel all are whole
    dense = rows * columns * (definition + 4 + 2 * 8) + 8 * side * (4 * side + rows + columns)
    return waiting + 2 * stacked + dense + sum(held_bytes(ref) for ref in step.inputs)


def dense_step(step: Step) -> Step:
    """The merge of the changes as whole matrices (out, in), as if each were a model and the base nothing but zeros."""
    first = step.inputs[0]
    base = replace(first, derived=Derived("low_rank", (), {"scaling": 1.0}))
    return replace(
        step, name=first.name, shape=first.shape, dtype="F32", base=base, base_model=step.models[0], factor=""
    )


def factor_cost(step: Step) -> tuple[float, int]:
    """(seconds on one core, bytes) of a module whose changes are formed and decomposed; zeros where they are not.

    Measured for 4096 x 4096, two adapters and rank 32, for which the space of the SVD grows to some hundred columns.
    """
    if step.factor != "A" or not is_dense(step):
        return 0.0, 0
    rows, columns = step.inputs[0].shape
    elements = rows * columns / (1 << 24)
    return elements * (SECONDS_EACH * len(step.inputs) + SECONDS_RANK * rank_of(step) / 32), factor_bytes(step)


def weights(step: Step) -> tuple[float, ...]:
    """The factor of each adapter's change in a weighted sum."""
    from merge.kernels.weights import divisor

    own: tuple[float, ...] = step.parameters["weight"]
    if step.method == "linear":
        by = math.fsum(own) if step.parameters.get("normalize", True) else 1.0
    else:
        by = divisor(own, step.parameters.get("normalize", False))
    return tuple(weight * (step.parameters.get("lambda", 1.0) / by) for weight in own)
