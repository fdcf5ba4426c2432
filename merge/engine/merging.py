"""Steps of kind "merge": a fused CPU kernel over blocks, or the torch definition of a whole tensor."""

from __future__ import annotations

import numpy as np

from merge.engine.context import Context, arguments, run_definition
from merge.engine.costs import method_of, needs_float64, runs_in_torch
from merge.engine.emit import Emitter
from merge.engine.statistics import digests, read_statistics
from merge.kernels.protocol import Block
from merge.one_thread import ONE_THREAD
from merge.plan import Step


def run(context: Context, index: int, step: Step) -> dict[str, object]:
    """On the CPU by a kernel where the method has one; all else is torch."""
    if step.size == 0 and not step.statistics:
        return _empty(context, step)
    return _torch(context, index, step) if runs_in_torch(step, context.device) else _fused(context, index, step)


def _empty(context: Context, step: Step) -> dict[str, object]:
    """No numbers, whatever the method: of a tensor [0, 2^40] it would prepare rows that fit no memory."""
    tensor = context.tensor(step)
    return Emitter(step, context.out, context.buffers).record(tensor.source_digests(), tensor.nonfinite())


def _fused(context: Context, index: int, step: Step) -> dict[str, object]:
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


def _torch(context: Context, index: int, step: Step) -> dict[str, object]:
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
