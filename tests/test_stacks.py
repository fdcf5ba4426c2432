"""Stacks: slices with methods of their own, up-scaling, the picture and the notes of a plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Output
from headers import LLAMA_70B, MISTRAL_7B, write_llama
from safetensors.numpy import load_file

from merge import build_plan, load_recipe, parse_recipe, run_plan, verify_output
from merge.errors import RecipeError
from merge.plan import Plan

RECIPES = Path(__file__).parent.parent / "recipes"
MakeModel = Callable[..., Path]
Arrays = dict[str, np.ndarray]


def planned(text: str) -> Plan:
    return build_plan(parse_recipe(text, "r.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        planned(text)
    return [str(problem) for problem in raised.value.problems]


def merged(text: str, out: Path) -> Arrays:
    run_plan(planned(text), out, threads=2)
    assert not verify_output(out).problems
    return load_file(out / "model.safetensors")


def layer(tensors: Arrays, number: int) -> Arrays:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


def assert_layer(got: Arrays, number: int, expected: Arrays) -> None:
    found = layer(got, number)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=f"{number}.{name}")


def mean(*layers: Arrays) -> Arrays:
    return {name: np.mean([one[name] for one in layers], axis=0) for name in layers[0]}


def generates(path: Path) -> np.ndarray:
    """Loads a result in transformers, has it generate, and returns its logits for a text."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert out.shape == (1, 7)
        return model(ids).logits.numpy()


@pytest.fixture
def two(tmp_path: Path, make_model: MakeModel) -> tuple[Path, Path, Arrays, Arrays]:
    a, b = make_model(tmp_path / "a", seed=1, layers=4), make_model(tmp_path / "b", seed=2, layers=4)
    return a, b, load_file(a / "model.safetensors"), load_file(b / "model.safetensors")


MIXED = """
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 3]}}]
  - merge_method: linear
    sources:
      - {{model: {a}, layer_range: [2, 4]}}
      - {{model: {b}, layer_range: [0, 2]}}
    parameters: {{weight: 1}}
  - sources: [{{model: {b}, layer_range: [3, 4]}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_one_slice_sums_while_others_stack(tmp_path: Path, two: tuple[Path, Path, Arrays, Arrays]) -> None:
    a, b, of_a, of_b = two
    got = merged(MIXED.format(a=a, b=b), tmp_path / "out")
    for number in range(3):
        assert_layer(got, number, layer(of_a, number))
    assert_layer(got, 3, mean(layer(of_a, 2), layer(of_b, 0)))
    assert_layer(got, 4, mean(layer(of_a, 3), layer(of_b, 1)))
    assert_layer(got, 5, layer(of_b, 3))
    assert np.array_equal(got["model.embed_tokens.weight"], of_a["model.embed_tokens.weight"])
    assert np.array_equal(got["lm_head.weight"], of_b["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    assert "**Method:** passthrough; in some parts linear" in (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert {entry["method"] for entry in manifest["tensors"].values()} == {"copy", "linear"}
    generates(tmp_path / "out")


def test_one_slice_stacks_while_others_merge_task_vectors(
    tmp_path: Path, make_model: MakeModel, two: tuple[Path, Path, Arrays, Arrays]
) -> None:
    a, b, of_a, of_b = two
    tune = make_model(tmp_path / "tune", seed=3, layers=4, base=a, delta=0.01)
    of_tune = load_file(tune / "model.safetensors")
    text = f"""
merge_method: task_arithmetic
base_model: {a}
slices:
  - sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {tune}, layer_range: [0, 2]}}]
    parameters: {{weight: 0.5}}
  - merge_method: passthrough
    sources: [{{model: {b}, layer_range: [1, 3]}}]
parameters: {{lambda: 2.0}}
"""
    got = merged(text, tmp_path / "out")
    for number in range(2):
        base, own = layer(of_a, number), layer(of_tune, number)
        assert_layer(got, number, {name: base[name] + 2.0 * 0.5 * (own[name] - base[name]) for name in base})
        assert_layer(got, number + 2, layer(of_b, number + 1))
    assert np.array_equal(got["model.norm.weight"], of_b["model.norm.weight"])


def test_the_same_model_twice_in_a_slice(tmp_path: Path, two: tuple[Path, Path, Arrays, Arrays]) -> None:
    a, _, of_a, _ = two
    text = f"""
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2], parameters: {{weight: 0.75}}}}
      - {{model: {a}, layer_range: [2, 4], parameters: {{weight: 0.25}}}}
"""
    got = merged(text, tmp_path / "out")
    for number in range(2):
        first, second = layer(of_a, number), layer(of_a, number + 2)
        assert_layer(got, number, {name: 0.75 * first[name] + 0.25 * second[name] for name in first})
    assert_layer(got, 1, {name: 0.75 * layer(of_a, 1)[name] + 0.25 * layer(of_a, 3)[name] for name in layer(of_a, 1)})


def test_parameters_are_held_against_the_methods_in_use() -> None:
    slices = "slices:\n- sources: [{model: a/b, layer_range: [0, 2]}]\n- merge_method: linear\n  sources: "
    two_sources = "[{model: a/b, layer_range: [0, 2]}, {model: a/c, layer_range: [0, 2]}]\n"

    def said(text: str) -> list[str]:
        with pytest.raises(RecipeError) as raised:
            parse_recipe(f"merge_method: passthrough\n{text}", "r.yaml")
        return [str(problem) for problem in raised.value.problems]

    (lacking, other) = said(slices + two_sources)
    assert lacking == 'r.yaml:5: linear needs the parameter "weight" for model "a/b"'
    assert 'model "a/c"' in other
    top = slices + two_sources + "parameters: {weight: 1, scale: 2}"
    assert parse_recipe(f"merge_method: passthrough\n{top}").slices[1].merge_method == "linear"
    (unknown,) = said(top.replace("scale", "density"))
    assert unknown.startswith('r.yaml:6: "density" is a parameter of ')
    assert "not of passthrough and linear, which have: scale, weight, normalize" in unknown
    own = slices + two_sources + "  parameters: {weight: 1, scale: 2}"
    (misplaced,) = said(own)
    assert misplaced == 'r.yaml:6: "scale" is a parameter of passthrough, not of linear, which has: weight, normalize'
    (typo,) = said(slices.replace("linear", "linaer") + two_sources)
    assert typo.startswith('r.yaml:4: unknown method "linaer"; did you mean "linear"?')
    (many,) = said("slices:\n- sources: " + two_sources)
    assert many == "r.yaml:3: slice 1: passthrough merges exactly 1 model, and 2 are listed"


def test_goliath_has_137_layers(tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    for name in ("Xwin-LM/Xwin-LM-70B-V0.1", "Sao10K/Euryale-1.3-L2-70B"):
        write_llama(tmp_path / name, LLAMA_70B)
    code, out, _ = call_cli(["plan", RECIPES / "goliath.yaml"], cwd=tmp_path)
    assert code == 0
    assert "stack    137 layers at model.layers.*, by source layers 0 to 79:" in out
    assert f"    16-31  {' ' * 8}{'B' * 16}{' ' * 56}  passthrough B 8-23\n" in out
    assert f"  122-136  {' ' * 65}{'A' * 15}  passthrough A 65-79\n" in out
    assert "117,748,948,992 parameters" in out
    assert "layers 16, 32, 48, 64 of Xwin-LM/Xwin-LM-70B-V0.1 are not used" in out


def test_solar_has_48_layers_and_its_parameters(tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    write_llama(tmp_path / "mistralai" / "Mistral-7B-v0.1", MISTRAL_7B, shards=2)
    code, out, _ = call_cli(["plan", RECIPES / "solar.yaml", "--json"], cwd=tmp_path)
    found = json.loads(out)
    assert (code, found["parameters"]) == (0, 10_731_524_096)
    (config,) = (file["text"] for file in found["plan"]["side_files"] if file["name"] == "config.json")
    assert json.loads(config)["num_hidden_layers"] == 48
    by_layers = (RECIPES / "solar.yaml").read_text().replace("overlap: 8", "layers: 48")
    (tmp_path / "layers.yaml").write_text(by_layers)
    again = json.loads(call_cli(["plan", "layers.yaml", "--json"], cwd=tmp_path).stdout)
    assert again["plan"]["steps"] == found["plan"]["steps"]
    assert "layers 8 to 23 of mistralai/Mistral-7B-v0.1 are used twice" in again["plan"]["notes"]


@pytest.mark.filterwarnings("ignore")
def test_inserted_layers_change_nothing_at_first(tmp_path: Path, two: tuple[Path, Path, Arrays, Arrays]) -> None:
    a, _, of_a, _ = two
    got = merged(f"models: [{{model: {a}}}]\nupscale: {{insert_every: 2}}", tmp_path / "out")
    assert_layer(got, 1, layer(of_a, 1))
    assert_layer(got, 3, layer(of_a, 2))
    inserted, source = layer(got, 2), layer(of_a, 1)
    for name, values in inserted.items():
        silent = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        assert np.array_equal(values, np.zeros_like(values) if silent else source[name]), name
    np.testing.assert_allclose(generates(tmp_path / "out"), generates(a), rtol=1e-5, atol=1e-6)
    plain = merged(f"models: [{{model: {a}}}]\nupscale: {{insert_every: 2, zero_init: no}}", tmp_path / "plain")
    assert_layer(plain, 2, layer(of_a, 1))


@pytest.mark.filterwarnings("ignore")
def test_an_upscaled_model_generates(tmp_path: Path, two: tuple[Path, Path, Arrays, Arrays]) -> None:
    a, _, of_a, _ = two
    got = merged(f"merge_method: passthrough\nmodels: [{{model: {a}}}]\nupscale: {{overlap: 1}}", tmp_path / "out")
    for number, source in enumerate((0, 1, 2, 1, 2, 3)):
        assert_layer(got, number, layer(of_a, source))
    generates(tmp_path / "out")


@pytest.mark.parametrize(
    ("upscale", "message"),
    [
        (
            "{overlap: 2}",
            "an overlap of 2 leaves 4 layers; A has 4 already. The largest overlap that makes it deeper is 1.",
        ),
        (
            "{layers: 7}",
            "7 layers cannot be made of two copies of A, which has 4 layers. Write an even number from 6 to 8.",
        ),
        (
            "{layers: 4}",
            "4 layers cannot be made of two copies of A, which has 4 layers. Write an even number from 6 to 8.",
        ),
        (
            "{layers: 10}",
            "10 layers cannot be made of two copies of A, which has 4 layers. Write an even number from 6 to 8.",
        ),
        ("{insert_every: 5}", "A has 4 layers, so that none is inserted after every 5. Write a number from 1 to 4."),
        ("{}", '"upscale" needs one of overlap, layers and insert_every; for example upscale: {overlap: 8}'),
        ("{overlap: 1, zero_init: true}", '"zero_init" is for layers that are inserted; give it with insert_every'),
        ("{overlap: -1}", '"overlap" must be a whole number of at least 0, not -1'),
        ("{overlp: 1}", 'unknown key "overlp"; did you mean "overlap"?'),
        ("48", '"upscale" must be a mapping of keys to values, not 48'),
    ],
)
def test_bad_upscaling(tmp_path: Path, make_model: MakeModel, upscale: str, message: str) -> None:
    a = make_model(tmp_path / "a", layers=4)
    said = problems(f"models: [{{model: {a}}}]\nupscale: {upscale}")
    assert any(one.startswith(f"r.yaml:2: {message}".replace("A ", f"{a} ").replace("A,", f"{a},")) for one in said), (
        said
    )


def test_upscaling_is_for_one_model_and_passthrough(tmp_path: Path, make_model: MakeModel) -> None:
    a = make_model(tmp_path / "a")
    model = f"{{model: {a}}}"
    assert "passthrough merges exactly 1 model" in problems(f"models: [{model}, {model}]\nupscale: {{overlap: 0}}")[0]
    linear = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{model}]\nupscale: {{overlap: 0}}"
    assert problems(linear) == ['r.yaml:4: "upscale" copies layers: its merge_method is passthrough, not linear']
    sliced = f"slices: [{{sources: [{{model: {a}, layer_range: [0, 1]}}]}}]\nupscale: {{overlap: 0}}"
    assert problems(sliced) == ['r.yaml:2: "upscale" makes the slices itself: list its only model under "models"']


def test_encoder_decoders_say_which_stack(tmp_path: Path) -> None:
    from headers import write_headers

    shapes = {f"{side}.block.{i}.layer.0.q.weight": (2, 2) for side in ("encoder", "decoder") for i in range(2)}
    path = write_headers(tmp_path / "t5", shapes, {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 2})
    said = problems(f"merge_method: passthrough\nslices: [{{sources: [{{model: {path}, layer_range: [0, 1]}}]}}]")
    assert said == [f'r.yaml:2: {path} has several stacks of layers; say which ones by "modules": encoder, decoder']


def test_the_picture_shows_sums_and_scales_down(
    tmp_path: Path, make_model: MakeModel, call_cli: Callable[..., Output]
) -> None:
    for name in ("a", "b"):
        make_model(tmp_path / name, layers=4)
    (tmp_path / "mixed.yaml").write_text(MIXED.format(a="a", b="b"))
    out = call_cli(["plan", "mixed.yaml"]).stdout
    lines = [line.rstrip() for line in out.splitlines()]
    assert "      0-2  AAA   A 0-2" in lines
    assert "      3-4  BBAA  linear A 2-3 + B 0-1" in lines
    assert "        5     B  B 3" in lines
    assert "         B  b" in lines
    write_llama(tmp_path / "big", LLAMA_70B)
    (tmp_path / "big.yaml").write_text("models: [{model: big}]\nupscale: {insert_every: 1}")
    out = call_cli(["plan", "big.yaml"], env={"COLUMNS": "72"}).stdout
    assert out.count("passthrough A ") == 20  # the first and the last rows of 160
    assert max(len(line) for line in out.split("\nlayers")[0].splitlines()) < 72
    assert "stack" not in call_cli(["plan", RECIPES / "linear.yaml"]).stdout.split("note")[0]


def test_recipes_of_stacks_plan(tmp_path: Path) -> None:
    plan = build_plan(load_recipe(RECIPES / "upscale.yaml"))
    assert {step.name.split(".")[2] for step in plan.steps if ".layers." in step.name} == {str(i) for i in range(8)}
    assert Plan.from_json(plan.to_json()) == plan


def test_the_recipes_of_the_guide_are_recipes() -> None:
    guide = (RECIPES.parent / "docs" / "stacks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert [bool(recipe.slices) for recipe in map(parse_recipe, blocks)] == [True, False, False]
