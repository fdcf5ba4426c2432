"""How many output elements of a bfloat16 merge are the correctly rounded value? Ours, and mergekit's.

    python benchmarks/exactness.py --models DIR --mergekit ENVIRONMENT/bin/mergekit-yaml

DIR holds what `python benchmarks/models.py DIR --size small` writes. The oracle takes the bfloat16 inputs as they are
and a recipe's weights as the decimal fractions that it writes (0.3 is three tenths): weighted sums are sums of whole
multiples, exact in float64, so that signs and halfway cases come out as on paper; one division follows; the result is
rounded once, from float64 to bfloat16. Slerp's factors are computed in float64. TIES keeps of equal magnitudes those of
lowest index. Masks of DARE are those of merge.kernels.reference.random_mask.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from both import read, run_mergekit, run_ours, tensors
from rich.console import Console
from rich.table import Table

from merge.kernels.reference import random_mask
from merge.random_keys import random_key

SEED = 11
Array = np.ndarray

# title -> method, base (with task vectors, or slerp's first), weights or t, densities, other parameters
CASES: dict[str, tuple[str, str | None, list[str], list[str], dict[str, Any]]] = {
    "linear, 0.3 0.3 0.4": ("linear", None, ["0.3", "0.3", "0.4"], [], {}),
    "linear, 1 1 1": ("linear", None, ["1", "1", "1"], [], {}),
    "slerp, t 0.35": ("slerp", "expert-1", ["0.35"], [], {}),
    "slerp, t 0.7, unrelated": ("slerp", "far", ["0.7"], [], {}),
    "task_arithmetic, 0.5 -0.3 0.4": ("task_arithmetic", "base", ["0.5", "-0.3", "0.4"], [], {"lambda": "0.9"}),
    "ties, 0.3 0.3 0.4, density 0.5": ("ties", "base", ["0.3", "0.3", "0.4"], ["0.5"] * 3, {"normalize": True}),
    "ties, 1 1 1, density 0.2": ("ties", "base", ["1", "1", "1"], ["0.2"] * 3, {"normalize": True}),
    "ties, sum, 0.7 -0.2 0.4": ("ties", "base", ["0.7", "-0.2", "0.4"], ["0.3"] * 3, {"normalize": False}),
    "dare_linear, 0.5 each, density 0.3": ("dare_linear", "base", ["0.5"] * 3, ["0.3"] * 3, {}),
    "dare_ties, 0.3 0.3 0.4, density 0.5": ("dare_ties", "base", ["0.3", "0.3", "0.4"], ["0.5"] * 3, {}),
}
EXPERTS = ["expert-1", "expert-2", "expert-3"]


def recipe(models: dict[str, Path], case: str) -> str:
    method, base, weights, densities, others = CASES[case]
    lines = [f"merge_method: {method}"]
    lines += [f"base_model: {models[base]}"] if base else []
    lines += ["models:"]
    for i, name in enumerate([base, "expert-2"] if method == "slerp" else EXPERTS):
        lines += [f"  - model: {models[str(name)]}"]
        given = [] if method == "slerp" else [f"weight: {weights[i]}"]
        given += [f"density: {densities[i]}"] if densities else []
        lines += [f"    parameters: {{{', '.join(given)}}}"] if given else []
    shared = {"t": weights[0]} if method == "slerp" else others
    lines += ["parameters:", *(f"  {key}: {str(value).lower()}" for key, value in shared.items())] if shared else []
    return "\n".join(lines) + "\n"


def oracle(case: str, name: str, inputs: list[Array], base: Array | None) -> Array:
    """inputs and base, bf16 values in float64 -> the exact result as nearly as float64 holds it"""
    method, _, weights, densities, others = CASES[case]
    if method == "slerp":
        return _slerp(inputs[0], inputs[1], Fraction(weights[0]))
    w = [Fraction(text) for text in weights]
    if method == "linear":
        return _ratio(_sum(w, inputs), sum(w))
    assert base is not None
    deltas = [x - base for x in inputs]
    if method == "ties":
        deltas = [_trim(x, base, float(share)) for x, share in zip(inputs, densities, strict=True)]
    if method.startswith("dare"):
        like = torch.empty(base.shape)
        masks = [
            random_mask(like, float(share), random_key(SEED, name, i)).numpy() for i, share in enumerate(densities)
        ]
        deltas = [np.where(mask, delta, 0) for mask, delta in zip(masks, deltas, strict=True)]
    factors = [x / Fraction(share) for x, share in zip(w, densities, strict=True)] if method.startswith("dare") else w
    scale = Fraction(others.get("lambda", "1"))
    if not method.endswith("ties"):
        return base + _ratio(_sum(factors, deltas), 1 / scale)
    positive = _sum(factors, deltas)[0] >= 0
    agrees = [((d * float(f) > 0) == positive) & (d != 0) for d, f in zip(deltas, factors, strict=True)]
    total = _sum(factors, [np.where(a, d, 0) for a, d in zip(agrees, deltas, strict=True)])
    if not others.get("normalize", False):
        return base + _ratio(total, Fraction(1))
    divisor = sum(a * x for a, x in zip(agrees, _whole(w)[0], strict=True))  # both times the common denominator
    return base + total[0] / np.where(divisor == 0, 1.0, divisor)


def _whole(numbers: list[Fraction]) -> tuple[list[float], int]:
    common = math.lcm(*(number.denominator for number in numbers))
    return [float(number * common) for number in numbers], common


def _sum(weights: list[Fraction], values: list[Array]) -> tuple[Array, int]:
    """(sum of whole multiples, what it is to be divided by)"""
    whole, common = _whole(weights)
    return sum((w * x for w, x in zip(whole, values, strict=True)), start=np.zeros(values[0].shape)), common


def _ratio(total: tuple[Array, int], divisor: Fraction | int) -> Array:
    exact = Fraction(divisor) * total[1]
    return total[0] * exact.denominator / exact.numerator


def _trim(x: Array, base: Array, density: float) -> Array:
    delta = x.astype(np.float32) - base.astype(np.float32)
    keep = max(1, math.floor(density * delta.size))
    kept = np.argsort(-np.abs(delta.ravel()), kind="stable")[:keep]
    trimmed = np.zeros(delta.size)
    trimmed[kept] = (x - base).ravel()[kept]
    return trimmed.reshape(x.shape)


def _slerp(a: Array, b: Array, place: Fraction) -> Array:
    cosine = float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return _ratio(_sum([1 - place, place], [a, b]), 1)
    t = float(place)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def to_bf16(values: Array) -> Array:
    """float64 -> the nearest bfloat16, halfway cases to even, as float64"""
    bits = values.view(np.uint64)
    odd = (bits >> np.uint64(45)) & np.uint64(1)
    rounded = (bits + np.uint64((1 << 44) - 1) + odd) >> np.uint64(45) << np.uint64(45)
    return rounded.view(np.float64)


def correct(models: dict[str, Path], case: str, out: Path) -> tuple[int, int]:
    """(elements that are correctly rounded, all elements) of a result"""
    method, base, _, _, _ = CASES[case]
    files = {name: tensors(path) for name, path in models.items()}
    result = tensors(out)
    good = total = 0
    for name in result:
        named = [base, "expert-2"] if method == "slerp" else EXPERTS
        inputs = [read(files[str(model)], name) for model in named]
        with_base = base is not None and method != "slerp"
        wanted = to_bf16(oracle(case, name, inputs, read(files[str(base)], name) if with_base else None))
        good += int((wanted == read(result, name)).sum())
        total += wanted.size
    return good, total


def write_far(path: Path, like: Path) -> None:
    """A model that is not a fine-tune of the base: the base's tensors with elements in reverse order."""
    from safetensors.torch import load_file, save_file

    path.mkdir()
    (path / "config.json").write_text((like / "config.json").read_text())
    values = {name: x for file in sorted(like.glob("*.safetensors")) for name, x in load_file(file).items()}
    save_file({name: x.flatten().flip(0).view(x.shape) for name, x in values.items()}, path / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory with base, expert-1, expert-2, expert-3")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment with mergekit 0.1.5")
    arguments = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_far(root / "far", arguments.models / "base")
        models = {name: (arguments.models / name).resolve() for name in ["base", *EXPERTS]} | {"far": root / "far"}

        def results(who: str, dtype: str, run: Callable[[list[tuple[Path, Path]]], dict[Path, str]]) -> dict[str, str]:
            jobs = {}
            for i, case in enumerate(CASES):
                if who == "ours" or not case.startswith("dare"):
                    file = root / f"{who}-{i}.yaml"
                    file.write_text(recipe(models, case) + dtype + (f"seed: {SEED}\n" if who == "ours" else ""))
                    jobs[case] = (file, root / f"{who}-{i}")
            failed = run(list(jobs.values()))
            shares = {}
            for case, (_, out) in jobs.items():
                if out in failed:
                    shares[case] = failed[out]
                else:
                    good, total = correct(models, case, out)
                    shares[case] = f"{good / total:.4%} ({total - good:,} wrong)"
            return shares

        def here(jobs: list[tuple[Path, Path]]) -> dict[Path, str]:
            return {out: failed for file, out in jobs if (failed := run_ours(file, out)) is not None}

        columns = {"ours": results("ours", "dtype: bfloat16\n", here)}
        if arguments.mergekit is not None:
            run = lambda jobs: run_mergekit(arguments.mergekit, jobs)  # noqa: E731
            columns["mergekit, dtype: bfloat16"] = results("theirs", "dtype: bfloat16\n", run)
            wide = "dtype: float32\nout_dtype: bfloat16\n"
            columns["mergekit, float32, out_dtype: bfloat16"] = results("theirs-wide", wide, run)
    table = Table("merge", *columns, title="Correctly rounded elements")
    for case in CASES:
        table.add_row(case, *(column.get(case, "") for column in columns.values()))
    console.print(table)


if __name__ == "__main__":
    main()
