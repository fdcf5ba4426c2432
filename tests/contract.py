"""What this tool promises for every architecture, as checks of one of them: see docs/architectures.md.

Each check raises AssertionError. `Family` is a base with two fine-tunes, written by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import build
from memory_tensor import run_reference
from safetensors import safe_open

from merge import build_plan, parse_recipe, run_plan
from merge.architecture import LAYER_COUNT_KEYS, Stack, architecture_of
from merge.methods import get_method
from merge.tools.convert import convert_plan

Tensors = Mapping[str, Any]


class Family:
    """A base and two fine-tunes on the disk, and what transformers loads from a directory."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.cls: Any = None
        for file, seed, step in (("base", 0, 0.0), ("a", 1, 0.02), ("b", 2, 0.02)):
            model = build(name, seed, step)
            self.cls = type(model)
            model.save_pretrained(path / file)
        self.base, self.a, self.b = (self.load(path / file) for file in ("base", "a", "b"))

    def load(self, path: Path) -> Tensors:
        """The state dict of what transformers loads, of which nothing was missing, unexpected or drawn anew."""
        model, info = self.cls.from_pretrained(path, output_loading_info=True)
        assert not any(info.values()), {key: value for key, value in info.items() if value}
        found: Tensors = model.state_dict()
        return found

    def config(self, file: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / file / "config.json").read_text(encoding="utf-8"))
        return found

    def merge(self, text: str, out: str) -> Path:
        """Carries out a recipe in which BASE, A and B are the models."""
        for word, file in (("BASE", "base"), ("A", "a"), ("B", "b")):
            text = text.replace(f": {word}", f": {self.path / file}")
        run_plan(build_plan(parse_recipe(text)), self.path / out, threads=1)
        return self.path / out


# 1. A merge.

LINEAR = (
    "merge_method: linear\nmodels:\n- {model: A, parameters: {weight: 0.7}}\n- {model: B, parameters: {weight: 0.3}}\n"
)
TIES = "merge_method: ties\nbase_model: BASE\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 1, density: 0.5}\n"
SLERP = "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]\nparameters: {t: 0.3}\n"


def check_mean(family: Family) -> None:
    """The mean of two fine-tunes loads, every number is the mean of theirs, and the flags are theirs."""
    out = family.load(family.merge(LINEAR, "linear"))
    assert list(out) == list(family.a)
    for key, value in out.items():
        a, b = family.a[key], family.b[key]
        wanted = (0.7 * a.double() + 0.3 * b.double()).to(value.dtype) if a.is_floating_point() else a
        assert value.dtype == a.dtype, key
        assert torch.allclose(value, wanted, rtol=1e-6, atol=1e-9), key
    assert family.config("linear") == family.config("a")


def check_methods(family: Family) -> None:
    """ties and slerp give what their definitions give of every stored tensor."""
    for recipe, method, files, settings in (
        (TIES, "ties", ("base", "a", "b"), {"weight": (1.0, 1.0), "density": (0.5, 0.5)}),
        (SLERP, "slerp", ("a", "b"), {"t": 0.3}),
    ):
        merged = stored(family.merge(recipe, method))
        sources = [stored(family.path / file) for file in files]
        assert merged.keys() == sources[0].keys()
        found = get_method(method)
        assert found is not None
        for key, value in merged.items():
            if value.dtype != np.float32:
                assert np.array_equal(value, sources[0][key]), key
                continue
            raw = np.stack([source[key].reshape(-1) for source in sources])
            wanted = run_reference(found, raw, value.shape, **settings)
            np.testing.assert_allclose(value.reshape(-1), wanted, rtol=1e-5, atol=1e-7, err_msg=key)
        assert family.config(method) == family.config("a")


def stored(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


# 2. A copy.


def check_copies(family: Family) -> None:
    """passthrough of one model and `merge convert` give the same loaded model, bit for bit."""
    copy = family.merge("merge_method: passthrough\nmodels: [{model: A}]\n", "copy")
    run_plan(convert_plan(str(family.path / "a")), family.path / "converted", threads=1)
    for path in (copy, family.path / "converted"):
        same(family.load(path), family.a)
        assert family.config(path.name) == family.config("a")


def same(found: Tensors, wanted: Tensors) -> None:
    assert list(found) == list(wanted)
    assert [key for key in found if not torch.equal(found[key], wanted[key])] == []


# 3. A stack.

_SLICES = """
INDENTslices:
INDENT- sources: [{model: A, layer_range: [0, END]}]
INDENT- sources: [{model: B, layer_range: [HALF, END]}]
"""
STACK = "merge_method: passthrough" + _SLICES.replace("INDENT", "")
STACKS = "merge_method: passthrough\nbase_model: A\nmodules:\n"
STACKS += "".join(f"  {side}:" + _SLICES.replace("INDENT", "    ") for side in ("encoder", "decoder"))


def check_stack(family: Family) -> None:
    """All layers of one fine-tune and then the last ones of the other: every layer is where it belongs."""
    config = family.config("a")
    text = config.get("text_config", config)
    n = next(text[key] for key in LAYER_COUNT_KEYS if key in text)
    recipe = STACKS if config.get("is_encoder_decoder") else STACK
    out = family.load(family.merge(recipe.replace("END", str(n)).replace("HALF", str(n // 2)), "stack"))
    origins = [(family.a, layer) for layer in range(n)] + [(family.b, layer) for layer in range(n // 2, n)]
    architecture = architecture_of(config)
    assert architecture.stacks
    stacks = [Stack(prefix, len(origins)) for prefix in architecture.stacks]
    per_layer = {each.name: each.axis for each in architecture.per_layer}
    found: set[tuple[str, int]] = set()
    for key, value in out.items():
        at = next(((stack, *at) for stack in stacks if (at := stack.layer(key))), None)
        if at is not None:
            stack, place, suffix = at
            source, layer = origins[place]
            assert torch.equal(value, source[stack.name(layer, suffix)]), key
            found.add((stack.prefix, place))
        elif key in per_layer:
            parts = [source[key].chunk(n, per_layer[key])[layer] for source, layer in origins]
            assert torch.equal(value, torch.cat(parts, per_layer[key])), key
        else:
            assert any(torch.equal(value, source[key]) for source in (family.a, family.b)), key
    assert len(found) == len(origins) * len(stacks)


CHECKS = {"mean": check_mean, "ties, slerp": check_methods, "copy": check_copies, "stack": check_stack}
