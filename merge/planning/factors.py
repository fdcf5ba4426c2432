"""Steps that make a factor of a combined adapter: what their plan says, without the numbers."""

from __future__ import annotations

from merge.methods import get_method
from merge.methods.registry import OnFactors
from merge.plan import Derived, Step

GROUP = 16  # modules whose A are computed before their B, so that threads do not wait for each other's halves


def rank_of(step: Step) -> int:
    return step.shape[0 if step.factor == "A" else -1]


def ranks_in(step: Step) -> list[int]:
    """The rank of each adapter's change, 0 where it makes none."""
    changes = [ref for ref in step.inputs if isinstance(ref, Derived)]
    return [change.inputs[0].shape[0] if change.inputs else 0 for change in changes]


def on_factors(step: Step) -> OnFactors | None:
    """How the method works on factors; None if it needs every entry of the changes."""
    method = get_method(step.method)
    return None if method is None else method.on_factors


def is_exact(step: Step) -> bool:
    """Whether the factors are those of the adapters side by side."""
    how = on_factors(step)
    fits = rank_of(step) == sum(ranks_in(step))
    return how is not None and how.weights is not None and not how.balanced and fits
