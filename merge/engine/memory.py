"""How much memory a run takes, and how a budget is kept.

Resident memory is the interpreter with its libraries, plus for each thread the blocks of every source, the float32
result and its encoding; it does not depend on the size of shards or models. Methods that pass over a tensor several
times may keep its sources in memory between passes, as far as the budget allows; without, they read them again.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

from merge import address_space
from merge.chunks import Chunks
from merge.derive import held_bytes
from merge.dtypes import DTYPES
from merge.engine.factors import dense_step, factor_bytes, factor_cost, is_dense, is_exact
from merge.engine.statistics import statistics_bytes
from merge.errors import UsageError
from merge.methods import get_method
from merge.plan import Plan, Step
from merge.processors import processors

# Measured: python, numpy, numba with compiled kernels, the plan of a 1B model. With torch: `import torch` on top.
INTERPRETER = 170 << 20
TORCH = 330 << 20
TRANSFORMERS = 480 << 20  # with torch, and the classes of one architecture
CACHE = 384 << 20  # of all threads, unless --max-ram says less
_SELECTION = (1 << 23) + (1 << 19)  # histograms for one model's thresholds on one thread, see kernels/selection.py
_RANKS = 28  # bytes for one element of a vector whose magnitudes are put in order, see kernels/ranks.py
_ORDERED = 1 << 20  # of rows of a matrix, which are taken a few at a time
_COMPUTED = 12  # bytes for one element of values that a threshold is found of, see kernels/computed.py

_PLANNING = 125 << 20  # python, numpy and the tokenizers library, before kernels are loaded

ALIGN_BLOCK = 1 << 20  # elements of one tensor that are compared at once, as float64
ALIGN_UNITS = 2048  # units that are compared at once
_SCIPY = 80 << 20  # with the buffers of matrix products


@dataclass(frozen=True)
class Budget:
    threads: int
    block_chunks: int
    cache_bytes: int  # for each thread
    peak: int  # predicted resident bytes


def budget(
    plan: Plan, threads: int | None, max_ram: int | None, device: str = "cpu", block_chunks: int | None = None
) -> Budget:
    """Threads, block size and cache for a run.

    Raises:
        UsageError: if even one thread with the smallest blocks does not fit max_ram.
    """
    threads, chunks = threads or processors(), block_chunks or 1
    least = predicted_peak(plan, threads, chunks, device)
    while max_ram is not None and least > max_ram and (chunks > 1 or threads > 1):
        chunks, threads = (chunks // 2, threads) if chunks > 1 else (chunks, threads - 1)
        least = predicted_peak(plan, threads, chunks, device)
    if max_ram is not None and least > max_ram:
        needed = -(-least >> 20) + 1
        raise UsageError(f"--max-ram {max_ram >> 20}MiB is too little: this merge needs {needed}MiB with one thread.")
    room = CACHE if max_ram is None else min(CACHE, max_ram - least)
    used = max((kept for step in plan.steps if (kept := _kept_bytes(step)) <= room // threads), default=0)
    return Budget(threads, chunks, room // threads, least + threads * used)


def check_address_space(plan: Plan, budget: Budget, device: str) -> None:
    """Raises MergeError if this process may not address what the run will need."""
    torch = any(
        not is_exact(step) if step.factor else step.method != "copy" and runs_in_torch(step, device)
        for step in plan.steps
    )
    more = budget.peak - INTERPRETER + budget.threads * address_space.EACH_THREAD
    address_space.check(more + (address_space.TORCH if torch else 0))


def predicted_peak(plan: Plan, threads: int, block_chunks: int, device: str = "cpu") -> int:
    """Bytes of resident memory at the most, without a cache."""
    per_thread = torch = 0
    for step in plan.steps:
        if step.factor:
            exact = is_exact(step)  # without torch
            torch = max(torch, 0 if exact else factor_bytes(step))
            per_thread = max(per_thread, _block_bytes(step, 1) + (factor_bytes(step) if exact else 0))
            continue
        if step.method != "copy" and runs_in_torch(step, device):
            # float32 inputs, task vectors and temporaries of the definition
            # (those of methods that decompose matrices are counted apart)
            _, decomposing = matrix_cost(step)
            floats = (2 if decomposing else 3) * len(step.sources) + 4
            torch = max(torch, step.size * 4 * floats + decomposing + statistics_bytes(step))
        per_thread = max(per_thread, _block_bytes(step, block_chunks))
    working = (TORCH if torch else 0) + threads * (per_thread + torch)
    running = INTERPRETER + plan.tokenizers_held + max(working, _align_bytes(plan), _gates_bytes(plan, threads))
    return max(running, _PLANNING + plan.tokenizers_peak if plan.tokenizers_peak else 0)


def matrix_cost(step: Step) -> tuple[float, int]:
    """(seconds on one core, bytes) that decomposing a step's matrices takes; zeros for most methods"""
    if step.factor:
        return factor_cost(step)
    method = get_method(step.method)
    if method is None or method.cost is None or (method.statistics and not step.statistics):
        return 0.0, 0
    return method.cost.of(step.shape, len(step.inputs))


def runs_in_torch(step: Step, device: str) -> bool:
    """Whether a step runs by its torch definition: on a GPU, without a kernel, and for float64."""
    method = get_method(step.method)
    return device != "cpu" or method is None or method.fused is None or needs_float64(step)


def needs_float64(step: Step) -> bool:
    return any(source.dtype == "F64" for source in step.sources)


def peak_resident() -> int:
    """Largest resident set of this process so far, in bytes; 0 where the system does not say (Windows)."""
    # Linux: getrusage also counts what the parent held when it started this process.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _align_bytes(plan: Plan) -> int:
    """What finding the orders of `align` takes, before the steps: the costs of all pairs of units, scipy, blocks."""
    if not plan.units:
        return 0
    costs = max(units.n_inner**2 + units.n_units**2 * (units.per_unit > 1) for units in plan.units)
    return _SCIPY + 8 * (costs + 6 * ALIGN_BLOCK + ALIGN_UNITS**2)


def _gates_bytes(plan: Plan, threads: int) -> int:
    """What running prompts takes, before the steps: transformers, a layer in float32, the states of all prompts."""
    gates = plan.experts.gates if plan.experts else None
    if gates is None:
        return 0
    tensors = [list(layer.values()) for layer in gates.layers]
    layer = max(sum(ref.size for ref in refs) for refs in tensors)
    widest = max((ref.shape[0] for refs in tensors for ref in refs if len(ref.shape) > 1), default=0)
    prompts = [prompt for row in (*gates.positive, *gates.negative) for prompt in row]
    longest = max(map(len, prompts), default=0)
    # States of before and after a layer; what one prompt's MLP and attention hold on each thread.
    states = 2 * sum(map(len, prompts)) * gates.embedding.shape[1]
    passing = threads * longest * (6 * gates.embedding.shape[1] + 4 * widest + 64 * longest)
    return TRANSFORMERS + 4 * (layer + states + passing)


def _block_bytes(step: Step, block_chunks: int) -> int:
    chunks = Chunks.of(step.shape)
    n = min(chunks.size, chunks.length * block_chunks)
    if step.factor:
        return n * DTYPES[step.dtype].itemsize
    method = get_method(step.method)
    widest = max(DTYPES[source.dtype].itemsize for source in step.sources)
    each = _raw_bytes(step) + 4 + widest + DTYPES[step.dtype].itemsize
    if method is not None and method.inputs == "deltas":
        each += 4 * len(step.inputs)  # factors of sparse task vectors
    more = sum(held_bytes(source) for source in step.sources)
    width = max(1, step.shape[-1]) if step.shape else 1
    if method is not None and method.locality == "row":
        if len(step.shape) < 2:
            n, each = chunks.size, each + _RANKS
        more += _ORDERED + _RANKS * width
    if method is not None and method.searches:
        each += _COMPUTED
        rows = chunks.size // width
        # A number for each row; a vector, which is one row, is held whole.
        more += method.searches * _SELECTION + 8 * rows + (4 * _raw_bytes(step) * width if rows == 1 else 0)
    elif method is not None and method.inputs == "deltas" and method.locality == "tensor":
        more += len(step.inputs) * _SELECTION
    return n * each + more


def _raw_bytes(step: Step) -> int:
    """Bytes for one element of all sources, as kernels read them."""
    direct = all(source.dtype == "BF16" and source.is_exact for source in step.sources)
    return len(step.sources) * (2 if direct else 8 if needs_float64(step) else 4)


def _kept_bytes(step: Step) -> int:
    method = get_method(step.method)
    several = method is not None and method.locality == "tensor"
    if step.factor:
        return _kept_bytes(dense_step(step)) if is_dense(step) else 0
    return step.size * _raw_bytes(step) if several else 0
