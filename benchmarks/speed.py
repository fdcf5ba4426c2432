"""Whole-process times and peak memory, side by side with mergekit and with the disk's floor, in one run.

    python benchmarks/models.py /big/disk/1b --size 1b
    python benchmarks/speed.py /big/disk/1b --mergekit path/to/mergekit-yaml

The floor is what any tool has to pay: `cat` of the inputs, and `dd` of the output's bytes with a closing sync.
Machines are shared and noisy: ours and the floor are run in turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

_SPARSE = "density: 0.5, weight: 0.33"
# method -> (models beside the base, each model's parameters, parameters of the merge, with a base_model?)
METHODS: dict[str, tuple[int, str, str, bool]] = {
    "ties": (3, _SPARSE, "", True),
    "dare_ties": (3, _SPARSE, "", True),
    "dare_linear": (3, _SPARSE, "", True),
    "breadcrumbs": (3, _SPARSE, "", True),
    "breadcrumbs_ties": (3, _SPARSE, "", True),
    "della": (3, _SPARSE, "", True),
    "della_linear": (3, _SPARSE, "", True),
    "slerp": (1, "", "t: 0.5", True),
    "linear": (3, "weight: 0.33", "", False),
    "task_arithmetic": (3, "weight: 0.33", "", True),
    "nuslerp": (2, "weight: 0.5", "", False),
    "multislerp": (3, "weight: 0.33", "", False),
    "karcher": (3, "", "", False),
    "nearswap": (1, "", "t: 0.001", True),
    "model_stock": (3, "", "", True),
    "sce": (3, "", "select_topk: 0.5", True),
    "arcee_fusion": (1, "", "", True),
    "ram": (3, "", "", True),
    "ramplus_tl": (3, "", "", True),
    "passthrough": (1, "", "", False),
}
_BASE_IS_LISTED = ("slerp",)


@dataclasses.dataclass
class Measured:
    seconds: float
    cpu: float
    peak: int  # bytes


def recipe(method: str, models: Path) -> tuple[str, list[Path]]:
    """(text, the models it reads)"""
    n, each, whole, base = METHODS[method]
    experts = sorted(models.glob("expert-*"))[:n]
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if base:
        lines.append(f"base_model: {models / 'base'}")
    lines.append("models:")
    if method in _BASE_IS_LISTED:
        lines.append(f"  - model: {models / 'base'}")
    for expert in experts:
        lines.append(f"  - model: {expert}")
        if each:
            lines.append(f"    parameters: {{{each}}}")
    if whole:
        lines.append(f"parameters: {{{whole}}}")
    return "\n".join(lines) + "\n", ([models / "base"] if base else []) + experts


def measure(command: list[str]) -> Measured:
    """Runs a command; its wall time, CPU time and largest resident set."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{message.decode()[-2000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale)


def weights(model: Path) -> list[str]:
    return [str(path) for path in sorted(model.glob("*.safetensors"))]


def floor(inputs: list[Path], out: Path, n_bytes: int) -> float:
    """Seconds to read the inputs and to write the output's bytes durably."""
    files = [file for model in inputs for file in weights(model)]
    read = measure(["sh", "-c", 'cat "$@" > /dev/null', "cat", *files])
    write = measure(["dd", "if=/dev/zero", f"of={out}", "bs=1M", f"count={n_bytes >> 20}", "conv=fsync"])
    out.unlink()
    return read.seconds + write.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", type=int, default=3, help="of ours and of the floor; mergekit runs once")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    work = arguments.models / "speed-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    rows = []
    for method in arguments.methods.split(","):
        rows.append(compare(method, arguments.models.resolve(), work, arguments.mergekit, arguments.runs))
        show(rows[-1])
    shutil.rmtree(work)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def compare(method: str, models: Path, work: Path, mergekit: Path | None, runs: int) -> dict[str, object]:
    text, inputs = recipe(method, models)
    file = work / f"{method}.yaml"
    file.write_text(text)
    ours_command = [sys.executable, "-m", "merge", "run", str(file), "-o", str(work / "ours"), "--force", "--quiet"]
    theirs, ours, floors = None, [], []
    floor(inputs, work / "zeros", sum(os.path.getsize(f) for f in weights(inputs[0])))  # warms the cache
    if mergekit:
        theirs = measure([str(mergekit), str(file), str(work / "theirs"), "--random-seed", "1"])
        shutil.rmtree(work / "theirs")
    for _ in range(runs):
        floors.append(floor(inputs, work / "zeros", sum(os.path.getsize(f) for f in weights(inputs[0]))))
        ours.append(measure(ours_command))
        shutil.rmtree(work / "ours")
    typical = statistics.median(one.seconds for one in ours)
    row: dict[str, object] = {
        "method": method,
        "seconds": [round(one.seconds, 2) for one in ours],
        "cpu_seconds": round(min(one.cpu for one in ours), 2),
        "peak_mib": max(one.peak for one in ours) >> 20,
        "floor_seconds": [round(one, 2) for one in floors],
        "times_floor": round(typical / statistics.median(floors), 2),
    }
    if theirs:
        row |= {
            "mergekit_seconds": round(theirs.seconds, 1),
            "mergekit_peak_mib": theirs.peak >> 20,
            "times_faster": round(theirs.seconds / typical, 1),
        }
    return row


def show(row: dict[str, object]) -> None:
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
