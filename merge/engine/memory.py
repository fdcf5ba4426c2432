"""Predicts a run's memory, and chooses threads, blocks and caches that fit a budget.

Resident memory is the interpreter with its libraries, plus for each thread the blocks of every source, the float32
result and its encoding; it does not depend on the size of shards or models. Methods that pass over a tensor several
times may keep its sources in memory between passes, as far as the budget allows; without, they read them again.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from merge import address_space
from merge.engine.costs import Budget, Needs, distinct, needs
from merge.errors import UsageError
from merge.plan import Derived, Plan, Step
from merge.processors import processors

# Measured: python, numpy, numba with compiled kernels, the plan of a 1B model. With torch: `import torch` on top.
INTERPRETER = 170 << 20
TORCH = 330 << 20
CACHE = 384 << 20  # of all threads, unless --max-ram says less

_EACH_STEP, _EACH_SOURCE = 600, 1100  # measured: 45,395 tensors of three models, 57 of 200
_PLANNING = 125 << 20  # python, numpy and the tokenizers library, before kernels are loaded


def budget(
    plan: Plan,
    threads: int | None,
    max_ram: int | None,
    device: str = "cpu",
    block_chunks: int | None = None,
    held: int = 0,
) -> Budget:
    """Threads, block size and cache for a run; `held`: bytes that the sink keeps in memory.

    Raises:
        UsageError: if even one thread with the smallest blocks does not fit max_ram.
    """
    threads, chunks = threads or processors(), block_chunks or 1
    kinds, held = distinct(plan.steps), held + _plan_bytes(plan)
    least = held + _peak(plan, kinds, threads, chunks, device)
    while max_ram is not None and least > max_ram and (chunks > 1 or threads > 1):
        chunks, threads = (chunks // 2, threads) if chunks > 1 else (chunks, threads - 1)
        least = held + _peak(plan, kinds, threads, chunks, device)
    if max_ram is not None and least > max_ram:
        needed = -(-least >> 20) + 1
        raise UsageError(f"--max-ram {max_ram >> 20}MiB is too little: this merge needs {needed}MiB with one thread.")
    room = CACHE if max_ram is None else min(CACHE, max_ram - least)
    used = max((n.kept for n in _needs(kinds, chunks, device) if n.kept <= room // threads), default=0)
    return Budget(threads, chunks, room // threads, least + threads * used)


def check_address_space(plan: Plan, budget: Budget, device: str) -> None:
    """Raises MergeError if the limit on address space is below what the run will need."""
    torch = any(each.torch for each in _needs(distinct(plan.steps), budget.block_chunks, device))
    more = budget.peak - INTERPRETER + budget.threads * address_space.EACH_THREAD
    address_space.check(more + (address_space.TORCH if torch else 0))


def predicted_peak(plan: Plan, threads: int, block_chunks: int, device: str = "cpu") -> int:
    """Peak resident bytes without a cache."""
    return _plan_bytes(plan) + _peak(plan, distinct(plan.steps), threads, block_chunks, device)


def _plan_bytes(plan: Plan) -> int:
    """What a plan takes, with the models' names while it is made and the records and the manifest of its run."""
    sources = 0
    for step in plan.steps:
        for ref in step.sources:
            sources += 1 + (len(ref.inputs) if isinstance(ref, Derived) else 0)
    return _EACH_STEP * len(plan.steps) + _EACH_SOURCE * sources


def _peak(plan: Plan, kinds: Sequence[Step], threads: int, block_chunks: int, device: str) -> int:
    each_step = _needs(kinds, block_chunks, device)
    per_thread, torch = (max(each, default=0) for each in ([n.blocks for n in each_step], [n.torch for n in each_step]))
    working = (TORCH if torch else 0) + threads * (per_thread + torch)
    finding = max((each.held_bytes(threads) for each in plan.findings), default=0)
    running = INTERPRETER + plan.tokenizers_held + max(working, finding)
    return max(running, _PLANNING + plan.tokenizers_peak if plan.tokenizers_peak else 0)


def _needs(kinds: Sequence[Step], block_chunks: int, device: str) -> list[Needs]:
    return [needs(step, block_chunks, device) for step in kinds]


def peak_resident() -> int:
    """Peak resident bytes of this process so far; 0 where the system does not report it (Windows)."""
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
