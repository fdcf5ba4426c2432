"""Numbers over whole models that a method needs before its first tensor; computed by merge.engine.model_pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge.methods import get_method
from merge.plan import Finding, Step

FINDER = "merge.engine.model_pass"


@dataclass(frozen=True, slots=True)
class WholeModels(Finding):
    """The finding for all steps of a method with such parameters; `key` is the method's name."""

    key: str
    asked: str  # "trim: model"
    finder: str = "model_pass"

    @property
    def bytes_read(self) -> int:
        return 0  # the steps read them again

    @property
    def what(self) -> str:
        return f"{self.key} with {self.asked} looks at the whole model first"

    def held_bytes(self, threads: int) -> int:
        return 0  # less than the steps themselves


FINDING = WholeModels


def looks_at_model(step: Step) -> bool:
    method = get_method(step.method) if step.kind == "merge" else None
    return method is not None and method.looks_at_model(step.parameters)


def whole_models(steps: Sequence[Step]) -> tuple[WholeModels, ...]:
    """One finding for each method that needs it."""
    names = sorted({step.method for step in steps if looks_at_model(step)})
    passes = {name: method.model_pass for name in names if (method := get_method(name)) is not None}
    return tuple(WholeModels(name, f"{each.key}: {each.value}") for name, each in passes.items() if each is not None)
