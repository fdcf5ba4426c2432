"""Finds the numbers over whole models that some methods need first; see merge.findings.model_pass."""

from __future__ import annotations

from collections.abc import Callable

from merge.engine.context import Context
from merge.engine.costs import method_of
from merge.findings.model_pass import WholeModels, looks_at_model

BEFORE_CHECKS = False


def find(context: Context, finding: WholeModels, tick: Callable[[], None]) -> None:
    steps = [(i, s) for i, s in enumerate(context.plan.steps) if s.method == finding.key and looks_at_model(s)]
    model_pass = method_of(steps[0][1]).model_pass
    assert model_pass is not None
    context.private.update(model_pass.load()(context, steps, tick))
