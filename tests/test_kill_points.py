"""Whichever call a command is stopped at, by a kill, a full disk or a broken one: what stands, and what follows.

Then OUT is the old result, or the whole new one, or not there; nothing else that was there is lost; an error is one
clear line. The same command then ends with the bytes of one that was never stopped, and leaves nothing beside them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills.campaign import Children, Trial
from kills.jobs import JOBS

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="says which file a descriptor is")
FEW = {"run: sparse": (4, 1), "run: pipeline": (3, 1), "run: in place of another, by two names": (4, 0)}


@pytest.fixture(scope="module")
def children(request: pytest.FixtureRequest) -> Iterator[Children]:
    with Children(everything=request.param) as found:
        yield found


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a file system: a run waits for the disk at every fsync."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


@pytest.mark.parametrize("children", [False], indirect=True, ids=["merges"])
@pytest.mark.parametrize("name", FEW)
def test_a_stopped_command_ends_well(name: str, folder: Path, children: Children) -> None:
    count = Trial(JOBS[name], folder, children).campaign(*FEW[name])
    print(f"\n{name}: {count}")
    assert not count.faults


@pytest.mark.full
@pytest.mark.parametrize("children", [True], indirect=True, ids=["all"])
@pytest.mark.parametrize("name", JOBS)
def test_every_verb_that_writes(name: str, folder: Path, children: Children) -> None:
    count = Trial(JOBS[name], folder, children).campaign(kills=10, errors=3)
    print(f"\n{name}: {count}")
    assert not count.faults
