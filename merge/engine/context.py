"""What the steps of a run share, and what a method's function is given."""

from __future__ import annotations

import sys
import threading
from typing import Any

from merge.checkpoint.reader import SourceReader
from merge.engine.costs import Budget, method_of
from merge.engine.crew import Worker
from merge.engine.tensor import Buffers, StepTensor
from merge.errors import MergeError, UsageError
from merge.methods import Method, get_method
from merge.output.sink import Sink
from merge.plan import Plan, Step
from merge.random_keys import random_key


class Context:
    """What every step of a run shares."""

    def __init__(self, plan: Plan, reader: SourceReader, crew: Worker, out: Sink, device: str, budget: Budget) -> None:
        self.plan, self.reader, self.crew, self.out, self.device = plan, reader, crew, out, device
        self.block_chunks, self._cache_bytes = budget.block_chunks, budget.cache_bytes
        self.buffers = Buffers()
        self.tiny = threading.Lock()  # held by the thread that does many tiny steps; see merge.engine.order
        self.shared: dict[str, Any] = {}  # what executors keep from one step for another
        self.private: dict[int, dict[str, Any]] = {}  # results of passes over the whole model, by step

    def tensor(self, step: Step, n_passes: int = 1) -> StepTensor:
        """The step's sources; kept in memory, as far as the budget goes, if there will be several passes."""
        return StepTensor(step, self.reader, self.crew, self.buffers, self._cache_bytes if n_passes > 1 else 0)


def check_method(plan: Plan) -> None:
    """Raises UsageError if a user's method is not what it was when the plan was made."""
    for name, origin in ((plan.method, plan.method_origin), *plan.other_origins.items()):
        found = get_method(name)
        if origin and (found is None or found.origin != origin):
            instead = "it is not known here" if found is None else f"here it is {found.origin or 'of merge-workbench'}"
            raise UsageError(
                f'the plan was made with the method "{name}" of {origin}, and {instead}. '
                "Load that one (--method-file, load_method_file), or make the plan again."
            )


def arguments(context: Context, index: int, step: Step) -> dict[str, Any]:
    """Keyword arguments of the method's function: the step's parameters, random keys, whole-model results."""
    method = method_of(step)
    keywords = method.keywords(step.parameters)
    if method.random:
        keywords["_keys"] = tuple(random_key(context.plan.seed, step.name, place) for place in range(len(step.inputs)))
    return keywords | context.private.get(index, {})


def run_definition(method: Method, step: Step, inputs: Any, keywords: dict[str, Any]) -> Any:
    """The definition's result; errors in a user's method get the tensor's name."""
    import torch

    if not method.origin:
        return method.reference(inputs, **keywords)
    from merge.methods.entry_points import failure

    try:
        merged = method.reference(inputs, **keywords)
    except (MergeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = failure(error, sys.modules[method.reference.__module__].__file__)
        raise MergeError(
            f"{step.name}: {method.name} ({method.origin.split(', sha256')[0]}) failed: {told}."
        ) from error
    shape = list(merged.shape) if isinstance(merged, torch.Tensor) else type(merged).__name__
    if shape != list(step.shape):
        raise MergeError(f"{step.name}: {method.name} must return a tensor of shape {list(step.shape)}, not {shape}.")
    return merged
