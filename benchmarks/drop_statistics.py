"""What random methods keep, by decile of magnitude, here and in mergekit.

    python benchmarks/drop_statistics.py --mergekit ENVIRONMENT/bin/mergekit-yaml

One fine-tune with weight 1, so that the result shows its sparse task vector. For each tenth of the entries of a row, by
magnitude: the share that is kept, and the L1 norm of what is left over that of the task vector (1: unbiased).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from both import read, run_mergekit, run_ours, tensors
from models import SIZES
from parity import write_family
from rich.console import Console
from rich.table import Table

SIZES["drops"] = (256, 2, 704, 2048, 4, 2)
METHODS = {
    "dare_linear": "density: 0.4",
    "dare_ties": "density: 0.4",
    "della_linear": "density: 0.4, epsilon: 0.3",
    "della": "density: 0.4, epsilon: 0.3",
}
RECIPE = """\
merge_method: {method}
base_model: {base}
models:
  - model: {tuned}
    parameters: {{weight: 1.0, {settings}}}
parameters: {{rescale: {rescale}}}
dtype: float32
"""


def by_decile(base: Path, tuned: Path, merged: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(share kept, L1 norm left) by decile, and the L1 norm left of all"""
    sums = np.zeros((4, 10))
    files = [tensors(model) for model in (base, tuned, merged)]
    for name in files[0]:
        b, x, y = (read(found, name) for found in files)
        if b.ndim < 2:
            continue
        size, left = np.abs(x - b), np.abs(y - b)
        ranks = np.argsort(np.argsort(size, axis=1, kind="stable"), axis=1)
        tenth = (ranks * 10 // size.shape[1]).reshape(-1)
        # Task vectors are multiples of 2^-27 here; what is next to nothing is a rounding of the sum with the base.
        for row, values in enumerate((left > 2.0**-29, np.ones_like(size), left, size)):
            sums[row] += np.bincount(tenth, values.reshape(-1), 10)
    return sums[0] / sums[1], sums[2] / sums[3], float(sums[2].sum() / sums[3].sum())


def cases() -> Iterator[tuple[str, str, bool]]:
    """(method, rescale, whether mergekit has it: its `true` is the L1 norm)"""
    for method in METHODS:
        yield from ((method, "false", True), (method, "true", True), (method, "l1", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of mergekit 0.1.5")
    mergekit = parser.parse_args().mergekit
    table = Table("method", "rescale", "tool", "share kept, by decile", "norm left: 1st, 5th, 10th decile", "all")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = write_family(root, "drops", ["BASE", "A"])
        jobs = []
        for method, rescale, known in cases():
            file = root / f"{method}-{rescale}.yaml"
            settings = {"base": models["BASE"], "tuned": models["A"], "settings": METHODS[method]}
            file.write_text(RECIPE.format(method=method, rescale=rescale, **settings))
            failed = run_ours(file, root / "ours" / file.stem)
            if failed:
                raise SystemExit(failed)
            jobs += [(file, root / "theirs" / file.stem)] if known else []
        run_mergekit(mergekit, jobs)
        for method, rescale, known in cases():
            for tool in ("ours", "theirs") if known else ("ours",):
                shares, norms, total = by_decile(models["BASE"], models["A"], root / tool / f"{method}-{rescale}")
                shown = " ".join(f"{share:.3f}" for share in shares)
                few = " ".join(f"{norms[i]:.2f}" for i in (0, 4, 9))
                name = "here" if tool == "ours" else "mergekit"
                table.add_row(method, rescale, name, shown, few, f"{total:.4f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
