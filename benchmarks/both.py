"""Runs recipes in Merge Workbench and in mergekit, for the comparisons of this folder.

mergekit is imported once, in its own environment, and its own command is called there for every recipe: starting it
anew would cost ten seconds each.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from merge import build_plan, load_recipe, run_plan
from merge.errors import MergeError
from merge.planning.common_names import map_prefix, rename

_DRIVER = """
import json, sys, traceback
from mergekit.scripts.run_yaml import main
said = {}
for recipe, out in json.load(open(sys.argv[1])):
    try:
        main([recipe, out, "--no-copy-tokenizer", "--quiet"], standalone_mode=False)
    except BaseException as error:
        said[out] = f"{type(error).__name__}: {error}"
json.dump(said, open(sys.argv[2], "w"))
"""


def run_mergekit(command: Path, jobs: list[tuple[Path, Path]]) -> dict[Path, str]:
    """jobs (recipe, output directory) -> what went wrong, by output directory

    Args:
        command: mergekit's `mergekit-yaml`; the Python beside it is used.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "jobs.json"), Path(folder, "said.json")
        asked.write_text(json.dumps([(str(recipe), str(out)) for recipe, out in jobs]))
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [command.with_name("python"), "-c", _DRIVER, asked, answer], env=environment, capture_output=True, text=True
        )
        if not answer.exists():
            raise SystemExit(f"mergekit did not run:\n{result.stderr[-2000:]}")
        return {Path(out): message for out, message in json.loads(answer.read_text()).items()}


def run_ours(recipe: Path, out: Path) -> str | None:
    """Runs a recipe here; returns what went wrong."""
    try:
        run_plan(build_plan(load_recipe(recipe)), out, force=True)
    except MergeError as error:
        return f"{type(error).__name__}: {error}"
    return None


def tensors(model: Path) -> dict[str, Path]:
    """Tensor name -> file, of a checkpoint directory."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def read(files: Mapping[str, Path], name: str) -> np.ndarray:
    """One tensor as float64, exactly."""
    with safe_open(files[name], "pt") as opened:
        return opened.get_tensor(name).double().numpy()


def pairs(ours: Path, theirs: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every tensor of two results, which must have the same names (but for a prefix that mergekit adds) and shapes."""
    mine, other = tensors(ours), tensors(theirs)
    added = map_prefix(list(other), list(mine)) or ("", "")
    renamed = {rename(name, *added, mine): name for name in other}
    if mine.keys() != renamed.keys():
        raise ValueError(f"tensors differ: {sorted(mine.keys() ^ renamed.keys())[:4]}")
    for name in mine:
        a, b = read(mine, name), read(other, renamed[name])
        if a.shape != b.shape:
            raise ValueError(f"{name}: {a.shape} here, {b.shape} in mergekit")
        yield name, a, b
