"""Which results have the same bytes on every machine, and what the others' bytes hang on.

Kernels fix the order of every sum and use no function of a library. A matrix decomposition is BLAS's and LAPACK's,
whose code differs by processor, version and settings: such results are equal to rounding.
"""

from __future__ import annotations

from merge.adapter_kinds import find_kind
from merge.derive import FOUND
from merge.engine.factors import is_exact
from merge.engine.memory import needs_float64
from merge.methods import get_method
from merge.plan import Step, TensorRef


def is_bitwise(step: Step, device: str) -> bool:
    """Whether a step gives the same bytes on every machine: kernels on the CPU, and all copies."""
    if not all(map(_is_bitwise_source, step.sources)):
        return False
    if step.method == "copy" or step.size == 0:
        return True
    if step.factor:
        return is_exact(step)
    return device == "cpu" and not needs_float64(step) and _promises(step.method)


def _promises(name: str) -> bool:
    method = get_method(name)
    return name == "copy" or (method is not None and method.reproducible == "bitwise")


def _is_bitwise_source(ref: TensorRef) -> bool:
    if ref.derived is None:
        return True
    operation, parameters = ref.derived.operation, ref.derived.parameters
    if operation in ("residual", FOUND):  # a decomposition; a model that was run
        return False
    if operation == "adapted" and not find_kind(parameters["kind"]).bitwise:
        return False
    if operation == "stage" and not _promises(parameters["method"]):
        return False
    return all(map(_is_bitwise_source, ref.derived.inputs))
