"""Steps of kind "merge": a fused CPU kernel over blocks, or the torch definition of a whole tensor."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from merge.engine.context import Context
from merge.engine.costs import does_in_float32, method_of, needs_float64, runs_in_torch
from merge.engine.emit import Emitter
from merge.engine.statistics import digests, read_statistics
from merge.errors import MergeError
from merge.kernels.protocol import Block
from merge.methods import Method
from merge.one_thread import ONE_THREAD
from merge.plan import Step
from merge.random_keys import random_key


def run(context: Context, index: int, step: Step) -> dict[str, object]:
    """On the CPU by a kernel where the method has one; all else is torch."""
    if step.size == 0 and not step.statistics:
        return _empty(context, step)
    keywords = arguments(context, step) | context.private.get(index, {})
    return (_torch if runs_in_torch(step, context.device) else _fused)(context, step, keywords)


def _empty(context: Context, step: Step) -> dict[str, object]:
    """No numbers, whatever the method: of a tensor [0, 2^40] it would prepare rows that fit no memory."""
    tensor = context.tensor(step)
    return Emitter(step, context.out, context.buffers).record(tensor.source_digests(), tensor.nonfinite())


def _fused(context: Context, step: Step, keywords: dict[str, Any]) -> dict[str, object]:
    """The numba way: statistics passes, then one pass that combines, rounds, digests and writes."""
    fused = method_of(step).load_fused()
    assert fused is not None
    tensor = context.tensor(step, n_passes=2 if method_of(step).locality == "tensor" else 1)
    emitter = Emitter(step, context.out, context.buffers)
    combine = fused(tensor, **keywords)

    def block(state: None, span: tuple[int, int]) -> None:
        loaded = tensor.load(*span)
        values = context.buffers.values(loaded.raw.shape[1])
        combine(loaded, values)
        emitter.put(loaded.start, values)

    context.crew.fold(lambda: None, block, tensor.blocks(context.block_chunks))
    return emitter.record(tensor.source_digests(), tensor.nonfinite())


def _torch(context: Context, step: Step, keywords: dict[str, Any]) -> dict[str, object]:
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


def arguments(context: Context, step: Step) -> dict[str, Any]:
    """Keyword arguments of the method's function: the step's parameters and random keys."""
    name = step.inputs[0].name if step.factor else step.name  # of a module: the same for A and B
    method = method_of(step)
    keywords = method.keywords(step.parameters)
    if method.float32:
        keywords["_float32"] = context.device == "cpu" and does_in_float32(step)
    if method.random:
        keywords["_keys"] = tuple(random_key(context.plan.seed, name, place) for place in range(len(step.inputs)))
    return keywords


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


def _widened(block: Block) -> object:
    if block.raw.dtype == np.uint16:
        return (block.raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.raw


def sources(context: Context, step: Step) -> dict[str, object]:
    tensor = context.tensor(step)

    def load(state: None, span: tuple[int, int]) -> None:
        tensor.load(*span)

    context.crew.fold(lambda: None, load, tensor.blocks(context.block_chunks))
    return {"sources": tensor.source_digests()} | digests(read_statistics(context.reader, step))
