"""The number of processors this process may use, by its affinity and the quota of its control group (containers)."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # cgroup v2, v1


def processors() -> int:
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, _quota() or bound))


def openmp_threads() -> int:
    """As many as processors(), or fewer if OMP_NUM_THREADS says so; its first number counts."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(processors(), int(asked)) if asked.isdecimal() and int(asked) else processors()


def _quota() -> int | None:
    """The CPU quota in processors, rounded up; None without a quota."""
    for name in _QUOTAS:
        try:
            words = Path(name).read_text(encoding="ascii").split()
            period = words[1] if len(words) > 1 else Path(name).with_name("cpu.cfs_period_us").read_text("ascii")
            share = int(words[0]) / int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
        if share > 0:
            return math.ceil(share)
    return None
