"""Operation "stage": a tensor that an earlier document of a pipeline merges, computed while a later one reads it.

The values are those that would be read back from that document's output: combined by the same kernels, rounded to its
dtype, widened again. Blocks are computed one chunk at a time. A method that looks at the whole tensor first (ties,
slerp) does so when the tensor is prepared; what it finds out (thresholds, norms) is small.
"""

from __future__ import annotations

from collections.abc import Sequence

from merge.chunks import Chunks
from merge.derive import Fill, Read
from merge.dtypes import DTYPES
from merge.methods import Method, get_method
from merge.plan import Derived, Step, TensorRef

_HISTOGRAMS = (1 << 23) + (1 << 19)  # of one input, while a threshold is looked for; see kernels/selection.py
_SCRATCH = 24  # bytes for an element of a row method: its ranks, sorted


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
    from merge.derive.stage_blocks import filler  # compiled kernels: a plan can do without

    return filler(ref, _method(ref), read)


def held_bytes(ref: Derived) -> int:
    method = _method(ref)
    chunks = Chunks.of(ref.shape)
    n_sources = len(ref.inputs)
    n = min(chunks.size, chunks.length)
    each = 4 * n_sources + 4 + DTYPES[ref.dtype].itemsize + 4  # sources, result, encoded, and a stored source
    if method.inputs == "deltas":
        each += 4 * n_sources
    if method.locality == "row":
        each += _SCRATCH
        n = chunks.size if len(ref.shape) < 2 else n
    searches = n_sources * _HISTOGRAMS if method.locality == "tensor" and method.inputs == "deltas" else 0
    return n * each + searches


def _method(ref: Derived) -> Method:
    method = get_method(ref.parameters["method"])
    assert method is not None, ref.parameters["method"]
    return method


def looks_at_all(ref: TensorRef) -> bool:
    """Whether reading any of it begins with passes over the whole tensor."""
    if not isinstance(ref, Derived):
        return False
    is_stage = ref.operation == "stage"
    own = is_stage and _method(ref).locality == "tensor"
    return own or any(looks_at_all(each) for each in ref.inputs)
