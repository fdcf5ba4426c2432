"""The same recipes in Merge Workbench and in mergekit: how far apart are the numbers?

    python benchmarks/parity.py --mergekit ENVIRONMENT/bin/mergekit-yaml

Models are random and small, float32, with task vectors whose magnitudes are all distinct: mergekit does not say which
of equal magnitudes TIES keeps. The relative difference of a tensor is

    max over its elements of |ours - theirs| / max(|theirs|, rms(theirs)),

rms the root mean square of that tensor in mergekit's result, so that elements that happen to be near zero count on the
scale of their tensor. A table shows the largest over all tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from both import pairs, run_mergekit, run_ours
from models import SIZES, config, shapes
from parity_recipes import EXAMPLES, RECIPES
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

GOAL = 1e-6
SIZES["parity"] = (64, 6, 176, 512, 4, 2)
SIZES["forty"] = (16, 40, 40, 96, 4, 2)


def write_family(root: Path, size: str, names: list[str], seed: int = 0) -> dict[str, Path]:
    """A base, names[0], and fine-tunes of it, the others, on a grid where their differences are exact float32."""
    random = np.random.default_rng(seed)
    family: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for tensor, shape in shapes(size).items():
        # Values below 0.125 are exact in steps of 2^-27 and those below 2, norms, in steps of 2^-23.
        grid, center, spread = (2.0**-23, 1.0, 0.05) if "norm" in tensor else (2.0**-27, 0.0, 0.015)
        base = center + grid * np.rint(np.clip(random.standard_normal(shape), -4, 4) * spread / grid)
        family[names[0]][tensor] = torch.from_numpy(base.astype(np.float32))
        for name in names[1:]:
            n = base.size  # distinct magnitudes up to 2^-11
            steps = random.choice(max(2 * n, int(2.0**-11 / grid)), n, replace=False) + 1
            delta = (steps * random.choice([-1.0, 1.0], n) * grid).reshape(shape)
            tuned = (base + delta).astype(np.float32)
            assert np.array_equal(tuned - base.astype(np.float32), delta)
            family[name][tensor] = torch.from_numpy(tuned)
    return _save(root, family, config(size, "float32"))


def write_far(root: Path, size: str, name: str, seed: int) -> dict[str, Path]:
    """A model that is not a fine-tune of the base: slerp between the two leaves the straight line."""
    generator = torch.Generator().manual_seed(seed)
    values = {tensor: torch.randn(shape, generator=generator) * 0.03 for tensor, shape in shapes(size).items()}
    return _save(root, {name: values}, config(size, "float32"))


def write_kin(root: Path, size: str, names: list[str], base: Path, seed: int) -> dict[str, Path]:
    """Fine-tunes that moved a third of the base's length, and partly the same way: their task vectors are alike."""
    generator = torch.Generator().manual_seed(seed)
    family: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for tensor, start in load_file(base / "model.safetensors").items():
        common = torch.randn(start.shape, generator=generator)
        for place, values in enumerate(family.values(), 1):
            values[tensor] = start + 0.003 * place * (common + torch.randn(start.shape, generator=generator))
    return _save(root, family, config(size, "float32"))


def write_gpt2(root: Path, name: str) -> dict[str, Path]:
    """12 layers under GPT-2's names, which have no prefix."""
    random = torch.Generator().manual_seed(5)
    hidden, sizes = 16, {"wte.weight": (96, 16), "wpe.weight": (32, 16), "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for i in range(12):
        for part, n in (("attn.c_attn", 3 * hidden), ("attn.c_proj", hidden), ("mlp.c_fc", 4 * hidden)):
            sizes |= {f"h.{i}.{part}.weight": (hidden, n), f"h.{i}.{part}.bias": (n,)}
        sizes |= {f"h.{i}.mlp.c_proj.weight": (4 * hidden, hidden), f"h.{i}.mlp.c_proj.bias": (hidden,)}
        sizes |= {f"h.{i}.ln_{k}.{what}": (hidden,) for k in (1, 2) for what in ("weight", "bias")}
    described = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_head": 4}
    described |= {"n_embd": hidden, "vocab_size": 96, "n_positions": 32, "n_ctx": 32}
    return _save(root, {name: {k: torch.randn(v, generator=random) for k, v in sizes.items()}}, described)


def _save(root: Path, family: dict[str, dict[str, torch.Tensor]], described: dict[str, object]) -> dict[str, Path]:
    for name, values in family.items():
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(described))
        save_file(values, root / name / "model.safetensors", metadata={"format": "pt"})
    return {name: root / name for name in family}


def difference(ours: Path, theirs: Path) -> tuple[float, float, str]:
    """(largest relative difference, share of elements that are equal, tensor of the largest difference)"""
    worst, where, equal, total = 0.0, "", 0, 0
    for name, a, b in pairs(ours, theirs):
        scale = np.maximum(np.abs(b), np.sqrt(np.mean(np.square(b))))
        relative = float((np.abs(a - b) / np.where(scale > 0, scale, 1.0)).max(initial=0.0))
        if relative > worst:
            worst, where = relative, name
        equal += int((a == b).sum())
        total += a.size
    return worst, equal / total, where


class Comparison:
    """Recipes written out, run in both tools, and compared."""

    def __init__(self, root: Path, models: dict[str, Path]) -> None:
        self.root, self.models = root, models
        self.jobs: dict[str, tuple[Path, Path, Path]] = {}

    def add(self, key: str, recipe: str) -> None:
        names = re.compile(r"\b(" + "|".join(self.models) + r")\b")
        file = self.root / f"{len(self.jobs)}.yaml"
        file.write_text(names.sub(lambda found: str(self.models[found[0]]), recipe))
        self.jobs[key] = (file, self.root / "ours" / file.stem, self.root / "theirs" / file.stem)

    def run(self, mergekit: Path) -> None:
        self.ours = {key: run_ours(file, out) for key, (file, out, _) in self.jobs.items()}
        said = run_mergekit(mergekit, [(file, out) for file, _, out in self.jobs.values()])
        self.theirs = {key: said.get(out) for key, (_, _, out) in self.jobs.items()}

    def result(self, key: str) -> tuple[float | None, str, str]:
        """(relative difference, share of equal elements, note)"""
        for who, failed in (("here", self.ours[key]), ("mergekit", self.theirs[key])):
            if failed:
                return None, "", f"{who}: {failed[:300]}"
        _, ours, theirs = self.jobs[key]
        try:
            worst, equal, where = difference(ours, theirs)
        except ValueError as error:
            return None, "", str(error)
        layers = [json.loads((out / "config.json").read_text()) for out in (ours, theirs)]
        counts = [found.get("num_hidden_layers", found.get("n_layer")) for found in layers]
        note = "" if worst <= GOAL else where
        return worst, f"{equal:.2%}", note if counts[0] == counts[1] else f"layers in config: {counts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of mergekit 0.1.5")
    mergekit = parser.parse_args().mergekit
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = write_family(root / "six", "parity", ["BASE", "A", "B", "C"])
        models |= write_far(root / "six", "parity", "FAR", 1)
        models |= write_kin(root / "six", "parity", ["KIN", "KIN2"], models["BASE"], 3)
        models |= write_family(root / "forty", "forty", ["LLAMA", "ORCA", "WIZARD", "PLATYPUS"], 2)
        models |= write_gpt2(root / "gpt2", "GPT2")
        comparison = Comparison(root, models)
        for method, idea, recipe in RECIPES:
            comparison.add(f"{method}: {idea}", recipe)
        for name, recipe in EXAMPLES.items():
            comparison.add(name, recipe)
            comparison.add(f"{name} in float32", recipe.replace("float16", "float32"))
        comparison.run(mergekit)

        columns = ("method", "recipe", "max rel. difference", "equal elements", "note")
        table = Table(*columns, title="float32, against mergekit")
        results = []
        for method, idea, _ in RECIPES:
            worst, equal, note = comparison.result(f"{method}: {idea}")
            results.append(worst)
            table.add_row(method, idea, "-" if worst is None else f"{worst:.1e}", equal, note)
        console.print(table)

        columns = ("example", "unchanged (float16)", "equal", "with dtype: float32", "equal", "note")
        table = Table(*columns, title="mergekit's examples")
        for name in EXAMPLES:
            half, half_equal, half_note = comparison.result(name)
            single, single_equal, note = comparison.result(f"{name} in float32")
            shown = ["-" if value is None else f"{value:.1e}" for value in (half, single)]
            note = note or (half_note if half is None else "")
            table.add_row(name, shown[0], half_equal, shown[1], single_equal, note)
            results.append(single)
        console.print(table)
        good = sum(worst is not None and worst <= GOAL for worst in results)
        console.print(f"{good} of {len(results)} float32 comparisons within {GOAL:.0e}")


if __name__ == "__main__":
    main()
