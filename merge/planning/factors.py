"""Steps that make a factor of a combined adapter: facts from the plan, without reading tensors."""

from __future__ import annotations

from merge.methods import get_method
from merge.methods.registry import OnFactors
from merge.plan import Derived, Step

GROUP = 16  # modules whose A are computed before their B, so that no thread waits for the other factor


def rank_of(step: Step) -> int:
    return step.shape[0 if step.factor == "A" else -1]


def ranks_in(step: Step) -> list[int]:
    """The rank of each adapter's change, 0 for an adapter without one."""
    changes = [ref for ref in step.inputs if isinstance(ref, Derived)]
    return [change.inputs[0].shape[0] if change.inputs else 0 for change in changes]


def on_factors(step: Step) -> OnFactors | None:
    """How the method works on factors; None if it needs every entry of the changes."""
    method = get_method(step.method)
    return None if method is None else method.on_factors


def is_exact(step: Step) -> bool:
    """Whether the result's factors are the adapters' factors side by side."""
    how = on_factors(step)
    fits = rank_of(step) == sum(ranks_in(step))
    return how is not None and how.weights is not None and not how.balanced and fits
