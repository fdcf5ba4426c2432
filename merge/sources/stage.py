"""Operation "stage": a tensor that an earlier document of a pipeline merges, computed while a later one reads it.

The values are those that would be read back from that document's output: combined by the same kernels, rounded to its
dtype, widened again. Blocks are computed one chunk at a time. A method that looks at the whole tensor first (ties,
slerp) does so when the tensor is prepared; what it finds out (thresholds, norms) is small.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge.chunks import Chunks
from merge.dtypes import DTYPES
from merge.methods import Method, known_method
from merge.plan import Derived, Step, TensorRef
from merge.sources import Fill, Read


def stage_tensor(step: Step, stage: str, models: Sequence[str], allow: Sequence[str], keys: Sequence[int]) -> TensorRef:
    """The output tensor of a step as a source for others.

    Args:
        step: of the earlier document's plan.
        stage: that document's name; `models` are the names of the step's sources and `allow` its leniencies.
        keys: names of the random numbers, one for each input, for methods that draw any.
    """
    parameters = {
        "stage": stage,
        "method": step.method,
        "settings": tuple(step.parameters.items()),
        "keys": tuple(keys),
        "models": tuple(models),
        "allow": tuple(allow),
    }
    return Derived(step.name, step.dtype, step.shape, "stage", step.sources, parameters)


def prepare(ref: Derived, read: Read) -> Fill:
    from merge.sources.stage_blocks import filler  # compiled kernels: a plan can do without

    return filler(ref, _method(ref), read)


def held_bytes(ref: Derived) -> int:
    n_sources = len(ref.inputs)
    chunks = Chunks.of(ref.shape)
    n = min(chunks.size, chunks.length)
    each = 4 * n_sources + 4 + DTYPES[ref.dtype].itemsize + 4  # sources, result, encoded, and a stored source
    return n * each + _method(ref).scratch(ref.shape, n_sources, n)


def _method(ref: Derived) -> Method:
    return known_method(ref.parameters["method"])


def looks_at_all(ref: TensorRef) -> bool:
    """Whether reading any of it begins with passes over the whole tensor."""
    if not isinstance(ref, Derived):
        return False
    is_stage = ref.operation == "stage"
    own = is_stage and _method(ref).locality == "tensor"
    return own or any(looks_at_all(each) for each in ref.inputs)
