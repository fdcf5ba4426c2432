"""Models of different architectures or sizes are refused first, once, and whatever the recipe allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_json, write_safetensors

from merge.errors import Problem, RecipeError, folded
from merge.jobs.build import build_plan
from merge.planning.load import load_recipe

ALLOW = "allow: [missing_tensors, shape_mismatch]\n"
LINEAR = "merge_method: linear\nmodels:\n- model: a\n- model: {}\nparameters: {{weight: 1}}\n"
STACK = """\
merge_method: passthrough
slices:
- sources: [{{model: a, layer_range: [0, 2]}}]
- sources: [{{model: {}, layer_range: [0, 2]}}]
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Path:
    make_model(tmp_path / "a")
    make_model(tmp_path / "wide", hidden=32, seed=1)
    make_model(tmp_path / "deep", layers=4, seed=2)
    other = tmp_path / "gpt2"
    other.mkdir()
    names = [f"h.{i}.{part}.weight" for i in range(2) for part in ("ln_1", "attn.c_attn", "mlp.c_fc")]
    tensors = {name: (np.zeros((16, 16), np.float32), "float32") for name in ["wte.weight", *names]}
    write_safetensors(other / "model.safetensors", tensors)
    write_json(other / "config.json", {"model_type": "gpt2", "n_layer": 2})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(models: Path, text: str) -> str:
    (models / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        build_plan(load_recipe("r.yaml"))
    return str(raised.value)


@pytest.mark.parametrize("more", ["", ALLOW])
def test_different_architectures_are_one_message_that_no_leniency_changes(models: Path, more: str) -> None:
    assert refused(models, LINEAR.format("gpt2") + more) == (
        "r.yaml:4: gpt2 (gpt2) and a (llama) are not of one architecture: 7 tensors of gpt2 (h.0.attn.c_attn.weight "
        '...) are not in the other. They cannot be merged, and no "allow" changes that.'
    )


@pytest.mark.parametrize("text", [LINEAR, LINEAR + ALLOW, STACK], ids=["strict", "lenient", "stack"])
def test_different_widths_are_one_message_that_no_leniency_changes(models: Path, text: str) -> None:
    found = refused(models, text.format("wide"))
    assert found.startswith("r.yaml:4: wide and a differ in size: hidden_size 32 and 16, intermediate_size 64 and 32.")
    assert "\n" not in found


def test_a_deeper_model_of_the_same_architecture_may_be_stacked(models: Path) -> None:
    (models / "r.yaml").write_text(STACK.format("deep"))
    assert len(build_plan(load_recipe("r.yaml")).steps) == 3 + 4 * 9


@pytest.mark.parametrize("more", ["", ALLOW])
def test_models_of_different_depth_are_not_merged_whole(models: Path, more: str) -> None:
    said = 'r.yaml:4: deep has 4 layers and a 2. List matching layers under "slices"; no "allow" permits this.'
    assert refused(models, LINEAR.format("deep") + more) == said


def test_what_every_tensor_lacks_is_said_once_with_a_count(
    models: Path, run_cli: Callable[..., Any], make_model: Callable[..., Path]
) -> None:
    parts = [
        f"model.layers.{layer}.self_attn.{part}.bias" for layer in range(2) for part in ("q_proj", "k_proj", "v_proj")
    ]
    make_model(models / "biased", seed=3, extra={name: np.ones(16, np.float32) for name in parts})
    (models / "r.yaml").write_text(LINEAR.format("biased"))
    done = run_cli(["plan", "r.yaml"])
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("merge: model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.q_proj.bias")
    assert "and 4 more: missing from a; found in biased." in done.stderr


def test_shapes_are_folded_too_and_lines_of_a_recipe_are_not() -> None:
    shapes = [Problem(f"shapes differ: a [{n}, 4], b [{n}, 6].", f"t{n}", "Do.") for n in range(5)]
    lines = [Problem("unknown key", f"r.yaml:{n}") for n in range(3)]
    assert folded([*shapes, *lines]) == [
        "t0, t1 and 3 more: shapes differ: a [0, 4], b [0, 6]. Do.",
        *(f"r.yaml:{n}: unknown key" for n in range(3)),
    ]
