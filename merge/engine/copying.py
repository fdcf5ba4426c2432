"""Steps of kind "copy": writes the source's bytes unchanged."""

from __future__ import annotations

import numpy as np

from merge.checkpoint.digest import stored_digest
from merge.dtypes import DTYPES
from merge.engine.context import Context
from merge.engine.emit import Emitter
from merge.errors import NumbersError
from merge.plan import Plan, Step


def run(context: Context, index: int, step: Step) -> dict[str, object]:
    """Copies the bytes. If a step has several inputs (integers, masks), they must be equal."""
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


def sources(context: Context, step: Step) -> dict[str, object]:
    return {"sources": [stored_digest(context.reader, ref) for ref in step.inputs]}
