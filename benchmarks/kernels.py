"""Every compiled loop of merge/kernels: nanoseconds an element, and whether its loops are in vector registers.

    python benchmarks/kernels.py                      under AVX2 alone, and under what this machine has
    python benchmarks/kernels.py --machine avx2 --json OUT.json
    python benchmarks/kernels.py --against OLD.json   with the ratio to an earlier list

Methods and commands are run on tensors of 131,072 elements (three models, bfloat16 where a kernel takes it), and the
arguments that each kernel gets are kept; it is then timed with those, on one thread, as the least CPU time of several
calls. The code is compiled afresh in a process of its own. A loop is packed if its arithmetic is on vectors; loops that
LLVM keeps for the last few elements of a packed one are not counted. The last column is the share of vector
instructions in the loop that does most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_calls import Call, calls_of, elements, key_of, unused
from machine_code import loops_of, vector_share

# What numba is told of the processor: most laptops' instructions, which any newer x86 runs too.
MACHINES = {
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+sse4.2,+popcnt,+lzcnt",
    },
}
Row = dict[str, Any]


def rows_here(names: Sequence[str], timed: bool) -> list[Row]:
    """What is known of each kernel in this process: name, ns an element, loops, packed loops, share."""
    rows, calls = [], calls_of(names)
    if not names and unused():
        sys.exit(f"tests/kernel_calls.py runs nothing that uses {', '.join(unused())}")
    for call in calls:
        loops = loops_of(call.kernel, call.types)
        rows.append(
            {
                "kernel": key_of(call.kernel),
                "types": call.shown,
                "ns": round(_nanoseconds(call), 3) if timed else None,
                "loops": len(loops),
                "packed": sum(loop.packed for loop in loops),
                "share": round(vector_share(call.kernel, call.types), 2),
                "compile_s": round(call.compile_seconds, 2),
                "scalar": [loop.shown for loop in loops if not loop.packed],
            }
        )
    return rows


def _nanoseconds(call: Call) -> float:
    least = min(call.cpu_seconds() for _ in range(5))
    for _ in range(max(5, min(200, int(0.2 / max(least, 1e-7))))):
        least = min(least, call.cpu_seconds())
    return least / elements(call.kernel, call.arguments) * 1e9


def rows_on(machine: str, names: Sequence[str], timed: bool = True) -> list[Row]:
    """The same in a process that compiles for this machine, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--worker", *names] + ([] if timed else ["--untimed"])
        env = os.environ | MACHINES[machine] | {"NUMBA_CACHE_DIR": cache}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def show(machine: str, rows: list[Row], old: list[Row]) -> None:
    before = {(row["kernel"], row["types"]): row["ns"] for row in old}
    print(f"\n{machine}")
    print(f"{'kernel':<34}{'numbers':<10}{'ns':>8}{'packed':>8}{'share':>7}" + ("  before  ratio" if old else ""))
    for row in rows:
        packed = f"{row['packed']}/{row['loops']}"
        line = f"{row['kernel']:<34}{row['types']:<10}{row['ns']:>8.3f}{packed:>8}{row['share']:>7.0%}"
        was = before.get((row["kernel"], row["types"]))
        print(line + (f"{was:>8.3f}{was / row['ns']:>7.2f}" if was else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods, or modules of merge/kernels, that are run; by default all")
    parser.add_argument("--machine", choices=MACHINES, help="this one alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--against", type=Path, help="figures of an earlier run")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--untimed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(rows_here(args.names, not args.untimed)))
        return
    old = json.loads(args.against.read_text()) if args.against else {}
    found = {}
    for machine in [args.machine] if args.machine else MACHINES:
        found[machine] = rows_on(machine, args.names)
        show(machine, found[machine], old.get(machine, []))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
