"""How much memory a run takes, and how a budget is kept: fewer chunks in a block, then fewer threads.

Resident memory is the interpreter with its libraries, plus for each thread the blocks of every source, the float32
result and its encoding. It does not depend on the size of tensors, shards or models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from merge.chunks import Chunks
from merge.dtypes import DTYPES
from merge.errors import UsageError
from merge.plan import Plan, Step

# Measured: python, numpy, numba with compiled kernels, the plan of a 1B model. With torch: `import torch` on top.
INTERPRETER = 170 << 20
TORCH = 330 << 20
_SELECTION = 3 * (1 << 14) * 8 + (1 << 16) * 8  # histograms of one model on one thread, see kernels/selection.py
_DEFAULT_BLOCK_CHUNKS = 1


@dataclass(frozen=True)
class Budget:
    threads: int
    block_chunks: int
    peak: int  # predicted resident bytes


def budget(
    plan: Plan, threads: int | None, max_ram: int | None, device: str = "cpu", block_chunks: int | None = None
) -> Budget:
    """Threads and block size for a run.

    Raises:
        UsageError: if even one thread with the smallest blocks does not fit max_ram.
    """
    threads = threads or _processors()
    chunks = block_chunks or _DEFAULT_BLOCK_CHUNKS
    peak = predicted_peak(plan, threads, chunks, device)
    while max_ram is not None and peak > max_ram and (chunks > 1 or threads > 1):
        chunks, threads = (chunks // 2, threads) if chunks > 1 else (chunks, threads - 1)
        peak = predicted_peak(plan, threads, chunks, device)
    if max_ram is not None and peak > max_ram:
        raise UsageError(f"--max-ram {max_ram >> 20} MiB is too little: this merge needs {peak >> 20} MiB with one thread.")
    return Budget(threads, chunks, peak)


def predicted_peak(plan: Plan, threads: int, block_chunks: int, device: str = "cpu") -> int:
    """Bytes of resident memory at the most."""
    from merge.engine.executors import executor, run_torch

    per_thread = torch = 0
    for step in plan.steps:
        if executor(step, device) is run_torch:
            # float32 inputs, task vectors and temporaries of the definition
            torch = max(torch, step.size * 4 * (3 * len(step.sources) + 4))
        per_thread = max(per_thread, _block_bytes(step, block_chunks))
    return INTERPRETER + (TORCH if torch else 0) + threads * (per_thread + torch)


def _block_bytes(step: Step, block_chunks: int) -> int:
    chunks = Chunks.of(step.shape)
    n = min(chunks.size, chunks.length * block_chunks)
    widest = max(DTYPES[source.dtype].itemsize for source in step.sources)
    direct = all(source.dtype == "BF16" and source.scale is None for source in step.sources)
    inputs = len(step.sources) * n * (2 if direct else max(4, widest))
    return inputs + n * (4 + widest + DTYPES[step.dtype].itemsize) + len(step.inputs) * _SELECTION


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
