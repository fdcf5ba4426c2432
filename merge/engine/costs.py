"""The cost of a step: memory, and time if it decomposes matrices. Computed from the plan alone.

It loads no kernel, so `merge plan` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from merge.chunks import Chunks
from merge.dtypes import DTYPES
from merge.methods import Method, known_method
from merge.plan import Derived, Step, Stored, TensorRef
from merge.planning.factors import GROUP, is_exact, on_factors, rank_of, ranks_in
from merge.sources import held_bytes

_SECONDS_EACH, _SECONDS_RANK = 0.5, 2.0  # for 4096 x 4096: an adapter's change in the method, the SVD for rank 32


@dataclass(frozen=True)
class Needs:
    """Bytes that each thread takes for a step.

    Attributes:
        blocks: for blocks that are read, computed and written.
        torch: for whole tensors in torch; 0 if torch is not imported.
        kept: for sources that stay in memory between passes, if there is room.
    """

    blocks: int
    torch: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Budget:
    threads: int
    block_chunks: int
    cache_bytes: int  # for each thread
    peak: int  # predicted resident bytes


def needs(step: Step, block_chunks: int, device: str) -> Needs:
    """The memory that a thread takes for a step."""
    if step.kind == "factor":
        return _factor_needs(step)
    if step.kind == "copy":
        return Needs(_block_bytes(step, _elements(step, block_chunks)))
    return _merge_needs(step, block_chunks, device)


def distinct(steps: Iterable[Step]) -> list[Step]:
    """One step of each group with the same memory cost: a plan may have 100,000 steps in a few groups."""
    found: dict[object, Step] = {}
    for step in steps:
        sources = step.sources
        kinds = [_kind(ref) for ref in sources]
        plain = not step.factor and not step.statistics and None not in kinds
        key = (step.method, step.shape, step.dtype, len(step.inputs), *kinds)
        found.setdefault(key if plain else id(step), step)
    return list(found.values())


def _kind(ref: TensorRef) -> object:
    """Equal for sources of one shape that cost the same; None of those that are looked at one by one."""
    if isinstance(ref, Stored):
        return ref.dtype
    if isinstance(ref, Derived) and ref.how == "decoded":
        inputs = [(each.dtype, each.shape) for each in ref.inputs if isinstance(each, Stored)]
        if len(inputs) == len(ref.inputs):
            return ref.operation, ref.dtype, *inputs, *ref.parameters.items()
    return None


def work(step: Step) -> tuple[float, int]:
    """(seconds on one core, bytes) that decomposing a step's matrices takes; zeros for most methods"""
    return {"copy": _no_work, "merge": _merge_work, "factor": _factor_work}[step.kind](step)


def method_of(step: Step) -> Method:
    return known_method(step.method)


def _no_work(step: Step) -> tuple[float, int]:
    return 0.0, 0


# Blocks.


def _elements(step: Step, block_chunks: int) -> int:
    chunks = Chunks.of(step.shape)
    return min(chunks.size, chunks.length * block_chunks)


def _block_bytes(step: Step, elements: int) -> int:
    """Memory of one block: all sources as read and as kernels take them, the float32 result, its encoding."""
    widest = max(DTYPES[source.dtype].itemsize for source in step.sources)
    each = _raw_bytes(step) + 4 + widest + DTYPES[step.dtype].itemsize
    return elements * each + sum(held_bytes(source) for source in step.sources)


def _raw_bytes(step: Step) -> int:
    """Bytes that kernels read for one element of all sources."""
    direct = all(source.dtype == "BF16" and source.is_exact for source in step.sources)
    return len(step.sources) * (2 if direct else 8 if needs_float64(step) else 4)


def needs_float64(step: Step) -> bool:
    return any(source.dtype == "F64" for source in step.sources)


def does_in_float32(step: Step) -> bool:
    """Whether matrices may be decomposed in float32, for the result is rounded to 16 bits."""
    to_16_bits = step.kind == "merge" and step.dtype in ("BF16", "F16")
    return to_16_bits and method_of(step).float32 and not needs_float64(step)


# Merges.


def runs_in_torch(step: Step, device: str) -> bool:
    """Whether a step runs by its torch definition: on a GPU, without a kernel, and for float64."""
    return device != "cpu" or method_of(step).fused is None or needs_float64(step)


def _merge_work(step: Step) -> tuple[float, int]:
    """(seconds on one core, bytes) that decomposing the step's matrices takes; zeros for most methods"""
    method = method_of(step)
    if method.cost is None or (method.statistics and not step.statistics):
        return 0.0, 0
    return method.cost.of(step.shape, len(step.inputs), does_in_float32(step))


def _merge_needs(step: Step, block_chunks: int, device: str) -> Needs:
    torch = 0
    if runs_in_torch(step, device):
        # float32 inputs, task vectors and temporaries of the definition
        # (those of methods that decompose matrices are counted apart)
        _, decomposing = _merge_work(step)
        floats = (2 if decomposing else 3) * len(step.sources) + 4
        torch = step.size * 4 * floats + decomposing + statistics_bytes(step)
    return Needs(_merge_blocks(step, block_chunks), torch, _kept(step))


def _merge_blocks(step: Step, block_chunks: int) -> int:
    elements = _elements(step, block_chunks)
    return _block_bytes(step, elements) + method_of(step).scratch(step.shape, len(step.inputs), elements)


def _kept(step: Step) -> int:
    return step.size * _raw_bytes(step) if method_of(step).locality == "tensor" else 0


def statistics_bytes(step: Step) -> int:
    """Memory of a method that uses statistics: float32 as read, and float64 sums, systems and factors."""
    sizes = [ref.size for ref in step.statistics]
    return 4 * sum(sizes) + 8 * 5 * max(sizes, default=0)


# Factors of adapters.


def dense_step(step: Step) -> Step:
    """The same merge of whole matrices (out, in): each change taken as a model, with a base of zeros."""
    first = step.inputs[0]
    base = Derived(first.name, first.dtype, first.shape, "low_rank", (), {"scaling": 1.0})
    return replace(
        step, name=first.name, shape=first.shape, dtype="F32", base=base, base_model=step.models[0], factor=""
    )


def _factor_work(step: Step) -> tuple[float, int]:
    """(seconds on one core, bytes) of forming and decomposing a module's changes; zeros if that is not needed.

    Measured for 4096 x 4096, two adapters and rank 32, where the SVD's subspace grows to some hundred columns.
    """
    if step.factor != "A" or on_factors(step) is not None:
        return 0.0, 0
    rows, columns = step.inputs[0].shape
    elements = rows * columns / (1 << 24)
    return elements * (_SECONDS_EACH * len(step.inputs) + _SECONDS_RANK * rank_of(step) / 32), _factor_bytes(step)


def _factor_needs(step: Step) -> Needs:
    exact = is_exact(step)  # without torch
    elements = min(step.size, Chunks.of(step.shape).length) * DTYPES[step.dtype].itemsize
    kept = 0 if on_factors(step) is not None else _kept(dense_step(step))
    return Needs(elements + (_factor_bytes(step) if exact else 0), 0 if exact else _factor_bytes(step), kept)


def _factor_bytes(step: Step) -> int:
    """Bytes that computing the factors of a step's module takes, including factors kept for a later step."""
    rows, columns = step.inputs[0].shape
    total, n = sum(ranks_in(step)), len(step.inputs)
    waiting = 4 * GROUP * rank_of(step) * max(rows, columns)
    stacked = 8 * total * (rows + columns)
    how = on_factors(step)
    if how is not None:
        more = 8 * how.elements(rows, columns, total, n) if how.elements else stacked * (2 if is_exact(step) else 6)
        return waiting + more
    side = min(rows, columns)
    definition = 0 if method_of(step).fused else 4 * (3 * n + 2)  # without a kernel all changes are whole matrices
    dense = rows * columns * (definition + 4 + 2 * 8) + 8 * side * (4 * side + rows + columns)
    return waiting + 2 * stacked + dense + sum(held_bytes(ref) for ref in step.inputs)
