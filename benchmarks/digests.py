"""The digests of what recipes give, to show that a change of the code keeps every byte.

    python benchmarks/digests.py OUT.json
    python benchmarks/digests.py --against OLD.json

It merges the recipes of recipes/ whose models are there, those of benchmarks/recipes/, the example of every method, FP8
weights and views in pickles, and the tiny models of tests/architectures.py as tests/contract.py does. Manifests, cards
and copies of recipes are left out, for they name places of this machine. A recipe that is refused is listed with its
error. Compare lists of one machine only: decompositions differ in their last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from architectures import names
from contract import CHECKS, Family
from models import SIZES
from parity import write_family, write_far, write_gpt2, write_kin
from parity_recipes import EXAMPLES, RECIPES
from safetensors.torch import load_file, save_file

from merge import build_plan, load_pipeline, parse_recipe, run_pipeline, run_plan
from merge.errors import MergeError
from merge.methods import all_methods
from merge.recipe.model import ModelRef
from merge.tools.extract.run import extract_adapter
from merge.tools.extract.select import Choice

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"merge_manifest.json", "merge_recipe.yaml", "README.md", "finetune_manifest.json"}
TUNED = ("reverse", "sort", "add")
Found = dict[str, str]


def digests(name: str, out: Path) -> Found:
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in LEFT_OUT)
    return {f"{name}/{path.relative_to(out)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def merged(name: str, recipe: str, out: Path) -> Found:
    try:
        run_plan(build_plan(parse_recipe(recipe)), out)
    except MergeError as error:
        return {name: type(error).__name__}
    return digests(name, out)


def written_recipes(root: Path) -> Iterator[Found]:
    """recipes/*.yaml, run where they lie; those of adapters once their adapters are extracted."""
    (root / "quickstart").symlink_to(ROOT / "recipes" / "quickstart")
    os.chdir(root)
    for name in TUNED[:2]:
        tuned, base = (ModelRef(f"quickstart/{each}", f"quickstart/{each}") for each in (name, "base"))
        extract_adapter(tuned, base, root / "lora" / name, choice=Choice(rank=32))
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        copy = root / file.name
        copy.write_bytes(file.read_bytes())
        try:
            run_pipeline(load_pipeline(copy), root / "results" / file.stem)
        except MergeError as error:
            yield {file.name: type(error).__name__}
        else:
            yield digests(file.name, root / "results" / file.stem)


def examples(root: Path) -> Iterator[Found]:
    """The example of every method, with models and adapters of the quickstart."""
    for name, method in all_methods().items():
        places: Iterator[str] = iter(["lora/reverse", "lora/sort"] if method.inputs == "adapters" else [])
        known = {"org/base": "quickstart/base"}
        for found in dict.fromkeys(re.findall(r"org/[\w-]+", method.example)):
            if found not in known:
                known[found] = next(places, f"quickstart/{TUNED[(len(known) - 1) % 3]}")
        recipe = re.sub(r"org/[\w-]+", lambda found, known=known: known[found[0]], method.example)  # type: ignore[misc]
        yield merged(f"example of {name}", recipe, root / f"example-{name}")
        if method.inputs == "deltas":  # with LoRA as task vectors
            recipe = re.sub(r"quickstart/(reverse|sort)", r"lora/\1", recipe)
            recipe = recipe.replace("quickstart/add", "lora/sort")
            yield merged(f"adapters by {name}", recipe, root / f"adapters-{name}")


def mergekit_recipes(root: Path) -> Iterator[Found]:
    SIZES["parity"], SIZES["forty"] = (64, 6, 176, 512, 4, 2), (16, 40, 40, 96, 4, 2)
    models = write_family(root / "six", "parity", ["BASE", "A", "B", "C"])
    models |= write_far(root / "six", "parity", "FAR", 1)
    models |= write_kin(root / "six", "parity", ["KIN", "KIN2"], models["BASE"], 3)
    models |= write_family(root / "forty", "forty", ["LLAMA", "ORCA", "WIZARD", "PLATYPUS"], 2)
    models |= write_gpt2(root / "gpt2", "GPT2")
    known = re.compile(r"\b(" + "|".join(models) + r")\b")
    recipes = {f"{i} {method}: {idea}": recipe for i, (method, idea, recipe) in enumerate(RECIPES)} | EXAMPLES
    for place, (name, recipe) in enumerate(recipes.items()):
        yield merged(name, known.sub(lambda found: str(models[found[0]]), recipe), root / "mergekit" / str(place))


def unusual_sources(root: Path) -> Iterator[Found]:
    """Models of FP8 with scales and of pickles with transposed views, merged, aligned, stacked and adapted."""
    tensors = load_file(root / "six" / "A" / "model.safetensors")
    matrix = re.compile(r"_proj\.weight$")
    generator = torch.Generator().manual_seed(0)
    quantized: dict[str, torch.Tensor] = {}
    for name, values in tensors.items():
        quantized[name] = values.to(torch.bfloat16)
        if matrix.search(name):
            grid = [-(-size // 32) for size in values.shape]
            quantized[f"{name}_scale_inv"] = torch.rand(*grid, generator=generator) + 0.5
            quantized[name] = (values * 50).to(torch.float8_e4m3fn)
    config = json.loads((root / "six" / "A" / "config.json").read_text())
    for folder in ("FP8", "VIEWS"):
        (root / folder).mkdir()
        more = (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}} if folder == "FP8" else {}
        )
        (root / folder / "config.json").write_text(json.dumps(config | more))
    save_file(quantized, root / "FP8" / "model.safetensors", metadata={"format": "pt"})
    views = {name: values.T.contiguous().T if matrix.search(name) else values for name, values in tensors.items()}
    torch.save(views, root / "VIEWS" / "pytorch_model.bin")
    places = {"A": root / "six" / "A", "B": root / "six" / "B", "FP8": root / "FP8", "VIEWS": root / "VIEWS"}
    for name, recipe in UNUSUAL.items():
        text = re.sub(r"\b(FP8|VIEWS|A|B)\b", lambda found: str(places[found[0]]), recipe)
        yield merged(name, text, root / f"unusual-{name}")


TWO = "models: [{model: FP8, parameters: {weight: 0.5}}, {model: VIEWS, parameters: {weight: 0.5}}]\n"
TIES = "models: [{model: B}]\nparameters: {weight: 1, density: 0.5}\n"
UNUSUAL = {
    "fp8 copied": "merge_method: passthrough\nmodels: [{model: FP8}]\n",
    "fp8 in bfloat16": "merge_method: passthrough\nmodels: [{model: FP8}]\ndtype: bfloat16\n",
    "views copied": "merge_method: passthrough\nmodels: [{model: VIEWS}]\n",
    "linear of both": f"merge_method: linear\n{TWO}",
    "ties on views": f"merge_method: ties\nbase_model: VIEWS\n{TIES}",
    "ties on fp8": f"merge_method: ties\nbase_model: FP8\n{TIES}allow: [unrelated_base]\n",
    "slerp in float64": "merge_method: slerp\nbase_model: VIEWS\nmodels: [{model: VIEWS}, {model: B}]\n"
    "parameters: {t: 0.3}\ndtype: float32\n",
    "aligned views": f"merge_method: linear\n{TWO.replace('FP8', 'B')}align: permutation\n",
    "aligned fp8": f"merge_method: linear\n{TWO.replace('VIEWS', 'B')}align: permutation\n",
    "aligned on fp8": f"merge_method: linear\n{TWO.replace('VIEWS', 'A')}align: permutation\n",
    "aligned slices": "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
    "- sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [3, 6]}]\nalign: permutation\n",
    "mixture of fp8 and views": "base_model: A\ngate_mode: random\nexperts:\n- {source_model: FP8}\n"
    "- {source_model: VIEWS}\ndtype: bfloat16\n",
    "noisy mixture": "base_model: A\ngate_mode: random\nexperts:\n- {source_model: A, noise_scale: 0.1}\n"
    "- {source_model: VIEWS}\ndtype: bfloat16\n",
}


def contract(root: Path) -> Iterator[Found]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in names():
        family = Family(name, root / name)
        for check in CHECKS.values():
            try:
                check(family)
            except (MergeError, AssertionError) as error:
                yield {f"{name}: {check.__name__}": type(error).__name__}
        for made in sorted((root / name).iterdir()):
            if made.name not in ("base", "a", "b"):
                yield digests(f"{name}/{made.name}", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true", help="without the tiny models of tests/architectures.py")
    parser.add_argument("--against", type=Path, help="an earlier list; exit 1 where this one differs")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out, against = (path and path.absolute() for path in (args.out, args.against))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        parts = (written_recipes, examples, mergekit_recipes, unusual_sources, contract)
        for part in parts[:-1] if args.quick else parts:
            for each in part(Path(folder)):
                found |= each
            print(f"{part.__name__}: {len(found):,} digests so far", file=sys.stderr)
        os.chdir(ROOT)
    if out is not None:
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if against is not None:
        old = json.loads(against.read_text())
        keys = found if args.quick else {*old, *found}
        different = sorted(key for key in keys if old.get(key) != found.get(key))
        print("\n".join(f"{key}: {old.get(key)} -> {found.get(key)}" for key in different))
        print(f"{len(found):,} digests, {len(different):,} of them different")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
