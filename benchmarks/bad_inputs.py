"""What `merge` says to each bad input that the tests try: input, exit code, message, as a Markdown table.

    python -m benchmarks.bad_inputs > docs/bad-inputs.md

The cases are those of tests/bad_inputs, run here in the same way.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bad_inputs import CASES, Outcome, try_out
from bad_inputs.machine import NotPossibleError


def main() -> None:
    bad = sum(case.code != 0 for case in CASES.values())
    print(f"# {bad} bad inputs, and {len(CASES) - bad} odd ones that work\n")
    print(
        "Made by `python -m benchmarks.bad_inputs`. Exit code 2: the recipe or the command is wrong, also when it does"
    )
    print("not fit the models; 1: the run failed, or an input is damaged; 0: it works. DIR is the working directory.\n")
    print("| input | exit code | message |\n|---|---|---|")
    for case in CASES.values():
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_out(case, Path(folder))
                message = told(outcome).replace(str(Path(folder).resolve()), "DIR").replace(folder, "DIR")
            except NotPossibleError as reason:
                outcome, message = Outcome(case.code, "", "", (), ()), f"(not tried here: {reason})"
        print(f"| {cell(case.what)} | {outcome.code} | {cell(message)} |")


def told(outcome: Outcome) -> str:
    """The message; of a usage error only its last line, and of a result the first ones, without times."""
    if outcome.stderr.startswith("Usage: "):
        return outcome.stderr.rpartition("\nError: ")[2]
    lines = (outcome.stderr + outcome.stdout).strip().splitlines()
    lines = [re.sub(r"storage \d+", "storage 1", line) for line in lines if "peak memory" not in line]
    return "\n".join(lines if len(lines) < 6 else [*lines[:4], f"... {len(lines) - 4} more lines"])


def cell(text: str) -> str:
    text = re.sub(r"(\w)\1{40,}", r"\1\1\1...", text)
    for letter in "\\|[<*_`":
        text = text.replace(letter, f"&#{ord(letter)};")
    return text.strip().replace("\n", "<br>")


if __name__ == "__main__":
    main()
