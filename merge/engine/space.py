"""Checks the free disk space before the work starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from merge.errors import OutputError
from merge.output.directory import partial_of, placed
from merge.output.workspace import RESULT
from merge.plan import Plan


def _existing_parent(out: Path) -> Path:
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    return place


def bytes_free(out: Path) -> int:
    """Free bytes where `out` would be made, including those that its partial result occupies."""
    partial = partial_of(out)
    held = (
        sum(file.stat().st_blocks * 512 for file in (partial / RESULT).rglob("*.safetensors"))
        if partial.is_dir()
        else 0
    )
    return shutil.disk_usage(_existing_parent(out)).free + held


def check_space(plan: Plan, out: Path) -> None:
    """Raises OutputError if the disk cannot hold the result or is not writable."""
    if placed(out) is not None:  # nothing is left to write
        return
    place = _existing_parent(out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(f"{place} is not a directory that can be written to. Choose another --out.")
    free = bytes_free(out)
    if free < plan.bytes_written:
        raise OutputError(
            f"{place}: the result needs {plan.bytes_written:,} bytes, the disk has {free:,} free. "
            "Make room, or choose another --out."
        )
