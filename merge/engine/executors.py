"""The ways to compute one step: copying bytes, a fused CPU kernel over blocks, or the torch definition."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.engine.adapters import Halves, run_factor
from merge.engine.crew import Crew
from merge.engine.emit import Emitter
from merge.engine.keys import random_key
from merge.engine.memory import Budget, needs_float64, runs_in_torch
from merge.engine.statistics import digests, read_statistics
from merge.engine.tensor import Buffers, StepTensor
from merge.errors import MergeError, NumbersError, UsageError
from merge.kernels.protocol import Block
from merge.methods import Method, get_method
from merge.output.writer import OutputDirectory
from merge.plan import Plan, Step


class Context:
    """What every step of a run shares."""

    def __init__(
        self, plan: Plan, reader: SourceReader, crew: Crew, out: OutputDirectory, device: str, budget: Budget
    ) -> None:
        self.plan, self.reader, self.crew, self.out, self.device = plan, reader, crew, out, device
        self.block_chunks, self._cache_bytes = budget.block_chunks, budget.cache_bytes
        self.buffers = Buffers()
        self.halves = Halves()
        self.private: dict[int, dict[str, Any]] = {}  # results of passes over the whole model, by step

    def tensor(self, step: Step, n_passes: int = 1) -> StepTensor:
        """The step's sources; kept in memory, as far as the budget goes, if there will be several passes."""
        return StepTensor(step, self.reader, self.crew, self.buffers, self._cache_bytes if n_passes > 1 else 0)


Executor = Callable[[Context, int, Step], dict[str, Any]]


def executor(step: Step, device: str) -> Executor:
    """Chooses: copies are copied, factors of adapters have an executor of their own, the CPU runs fused kernels where
    a method has them, all else is torch."""
    if step.method == "copy":
        return run_copy
    if step.factor:
        return run_factor
    if step.size == 0 and not step.statistics:
        return run_empty
    return run_torch if runs_in_torch(step, device) else run_fused


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


def method_of(step: Step) -> Method:
    method = get_method(step.method)
    assert method is not None, step.method  # the plan was made from registered methods
    return method


def arguments(context: Context, index: int, step: Step) -> dict[str, Any]:
    """Keyword arguments of the method's function: the step's parameters, random keys, whole-model results."""
    method = method_of(step)
    keywords = {("lambda_" if key == "lambda" else key): value for key, value in step.parameters.items()}
    if method.random:
        keywords["_keys"] = tuple(random_key(context.plan.seed, step.name, place) for place in range(len(step.inputs)))
    return keywords | context.private.get(index, {})


def run_copy(context: Context, index: int, step: Step) -> dict[str, Any]:
    """Bytes pass through; where there are several inputs (integers, masks) they must agree."""
    storage = np.dtype(DTYPES[step.dtype].numpy_name)
    first, *others = step.inputs
    emitter = Emitter(step, context.out, context.buffers)
    tensor = context.tensor(step)

    def copy(state: None, span: tuple[int, int]) -> None:
        start, stop = tensor.chunks.span(*span)
        data = context.buffers.encoded(stop - start, storage)
        context.reader.read_into(first, start, data)
        for place, other in enumerate(others, 1):
            theirs = context.buffers.stored(stop - start, storage)
            context.reader.read_into(other, start, theirs)
            if not np.array_equal(data.view(np.uint8), theirs.view(np.uint8)):
                raise _disagree(context.plan, step, place)
        emitter.put_stored(start, data)

    context.crew.fold(lambda: None, copy, tensor.blocks(context.block_chunks))
    record = emitter.record([], [])
    record["sources"] = [record["digest"]] * len(step.inputs)
    return record


def _disagree(plan: Plan, step: Step, place: int) -> NumbersError:
    first, other = (plan.models[step.models[i]].ref for i in (0, place))
    return NumbersError(
        f"{step.name} ({step.dtype}): {first} and {other} hold different values, and {step.dtype} cannot be merged. "
        'Set "allow: [integer_mismatch]" to copy it from the base (else the first model).'
    )


def run_empty(context: Context, index: int, step: Step) -> dict[str, Any]:
    """No numbers, whatever the method: of a tensor [0, 2^40] it would prepare rows that fit no memory."""
    tensor = context.tensor(step)
    return Emitter(step, context.out, context.buffers).record(tensor.source_digests(), tensor.nonfinite())


def run_fused(context: Context, index: int, step: Step) -> dict[str, Any]:
    """The numba way: statistics passes, then one pass that combines, rounds, digests and writes."""
    fused = method_of(step).load_fused()
    assert fused is not None
    tensor = context.tensor(step, n_passes=2 if method_of(step).locality == "tensor" else 1)
    emitter = Emitter(step, context.out, context.buffers)
    combine = fused(tensor, **arguments(context, index, step))

    def block(state: None, span: tuple[int, int]) -> None:
        loaded = tensor.load(*span)
        values = context.buffers.values(loaded.raw.shape[1])
        combine(loaded, values)
        emitter.put(loaded.start, values)

    context.crew.fold(lambda: None, block, tensor.blocks(context.block_chunks))
    return emitter.record(tensor.source_digests(), tensor.nonfinite())


def run_torch(context: Context, index: int, step: Step) -> dict[str, Any]:
    """The definition, on whole tensors: for a GPU, for methods without a kernel, and for float64."""
    import torch

    method = method_of(step)
    tensor = context.tensor(step)
    kind = np.float64 if needs_float64(step) else np.float32
    whole = np.empty((len(step.sources), step.size), kind)

    def load(state: None, span: tuple[int, int]) -> None:
        block = tensor.load(*span)
        whole[:, block.start : block.start + block.raw.shape[1]] = _widened(block)

    context.crew.fold(lambda: None, load, tensor.blocks(context.block_chunks))
    try:
        values = torch.from_numpy(whole).to(context.device).view(len(step.sources), *step.shape)
        inputs = values if step.base is None else values[1:] - values[0]
        keywords = arguments(context, index, step)
        statistics = read_statistics(context.reader, step)
        if method.statistics is not None:
            keywords["_statistics"] = tuple(torch.from_numpy(array).to(context.device) for array in statistics)
        with ONE_THREAD:
            merged = run_definition(method, step, inputs, keywords)
        if step.base is not None:
            merged = values[0] + merged
        result = merged.to(values.dtype).cpu().contiguous().view(-1).numpy()  # methods may sum in float64
    except torch.OutOfMemoryError as error:
        raise MemoryError from error
    emitter = Emitter(step, context.out, context.buffers)
    for first, n in tensor.blocks(context.block_chunks):
        start, stop = tensor.chunks.span(first, n)
        emitter.put(start, result[start:stop])
    return emitter.record(tensor.source_digests(), tensor.nonfinite()) | digests(statistics)


class _OneThread:
    """Holds torch to the thread of each worker inside, as a context; the last one out puts back what was set.

    Workers run steps side by side, so torch's own threads on top oversubscribe the machine. Decompositions bear it
    worst, as their threads wait for each other thousands of times. Measured on two cores, eigh of two matrices of
    2048 x 2048 in float64: two workers with one thread each 1.6 s, one worker with two threads 1.4 s, but 13 s for a
    single matrix once something else keeps the cores busy. It also makes the order of sums, and so the bytes, the
    same whatever the number of cores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._usual = 0, 1

    def __enter__(self) -> None:
        import torch

        with self._lock:
            if self._inside == 0:
                self._usual = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        import torch

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_num_threads(self._usual)


ONE_THREAD = _OneThread()


def run_definition(method: Method, step: Step, inputs: Any, keywords: dict[str, Any]) -> Any:
    """The definition's result; what goes wrong in one that a user wrote is told with the tensor's name."""
    import torch

    if not method.origin:
        return method.reference(inputs, **keywords)
    from merge.user_methods import failure

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


def _widened(block: Block) -> Any:
    if block.raw.dtype == np.uint16:
        return (block.raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.raw
