"""The three kinds of step, and who carries each out."""

from __future__ import annotations

from typing import Protocol

from merge.engine import copying, factors, merging
from merge.engine.context import Context
from merge.plan import Kind, Step


class Executor(Protocol):
    """What the module of a kind has."""

    def run(self, context: Context, index: int, step: Step) -> dict[str, object]:
        """Computes and writes the step's tensor; returns its record for journal and manifest."""

    def sources(self, context: Context, step: Step) -> dict[str, object]:
        """What the record of a step says of its sources, found by reading them."""


EXECUTORS: dict[Kind, Executor] = {"copy": copying, "merge": merging, "factor": factors}


def executor(step: Step) -> Executor:
    return EXECUTORS[step.kind]
