"""Context: the plan, reader, threads, sink and buffers that all steps of a run share."""

from __future__ import annotations

import threading
from typing import Any

from merge.checkpoint.reader import SourceReader
from merge.engine.costs import Budget
from merge.engine.crew import Worker
from merge.engine.tensor import Buffers, StepTensor
from merge.errors import UsageError
from merge.methods import get_method
from merge.output.sink import Sink
from merge.plan import Plan, Step


class Context:
    """What all steps of a run share: plan, reader, threads, sink, buffers."""

    def __init__(self, plan: Plan, reader: SourceReader, crew: Worker, out: Sink, device: str, budget: Budget) -> None:
        self.plan, self.reader, self.crew, self.out, self.device = plan, reader, crew, out, device
        self.block_chunks, self._cache_bytes = budget.block_chunks, budget.cache_bytes
        self.buffers = Buffers()
        self.tiny = threading.Lock()  # held by the thread that does many tiny steps; see merge.engine.order
        self.shared: dict[str, Any] = {}  # what executors keep from one step for another
        self.private: dict[int, dict[str, Any]] = {}  # results of passes over the whole model, by step

    def tensor(self, step: Step, n_passes: int = 1) -> StepTensor:
        """The step's sources; with several passes they stay in memory between them, within the budget."""
        return StepTensor(step, self.reader, self.crew, self.buffers, self._cache_bytes if n_passes > 1 else 0)


def check_method(plan: Plan) -> None:
    """Raises UsageError if a user's method has changed since the plan was made."""
    for name, origin in ((plan.method, plan.method_origin), *plan.other_origins.items()):
        found = get_method(name)
        if origin and (found is None or found.origin != origin):
            instead = "it is not known here" if found is None else f"here it is {found.origin or 'of merge-workbench'}"
            raise UsageError(
                f'the plan was made with the method "{name}" of {origin}, and {instead}. '
                "Load that one (--method-file, load_method_file), or make the plan again."
            )
