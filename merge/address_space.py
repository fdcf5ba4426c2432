"""Checks the limit on address space before it is needed.

Under a small `ulimit -v` libraries break instead of failing: OpenBLAS tries for ever to get its buffers, LLVM aborts
the process, locks cannot be made. So what will be needed is compared with the limit while a message is possible.
"""

from __future__ import annotations

import os

from merge.errors import MergeError

# Measured on Linux (x86-64, glibc), besides resident memory.
COMPILER = 610 << 20  # python, numpy, scipy and numba, and kernels while they are compiled, on two cores
TORCH = 280 << 20
EACH_THREAD = 80 << 20  # its stack, and an arena of the allocator
_BLAS = 2 * (32 << 20)  # for each further core: numpy and scipy have an OpenBLAS each


def check(more: int = 0) -> None:
    """Raises MergeError if numba and `more` bytes exceed the limit on address space."""
    needed = COMPILER + more + _BLAS * max(0, min(os.cpu_count() or 1, 64) - 2)
    limit = _limit()
    if limit is not None and needed > limit:
        raise MergeError(
            f"this process may address {limit >> 20}MiB (ulimit -v), and about {needed >> 20}MiB are needed. Raise the "
            "limit: ulimit -v unlimited. What is resident stays as small; --max-ram limits that."
        )


def _limit() -> int | None:
    """The limit in bytes; None if there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
