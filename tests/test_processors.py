"""How many processors a container may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge import processors as module
from merge.processors import openmp_threads, processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_QUOTAS", (tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert processors() == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, 8), ("", 8), ("1", 1), ("3,1", 3), ("64", 8), ("0", 8), ("many", 8)]
)
def test_threads_of_training_heed_openmp(monkeypatch: pytest.MonkeyPatch, asked: str | None, expected: int) -> None:
    monkeypatch.setattr(module, "processors", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert openmp_threads() == expected
