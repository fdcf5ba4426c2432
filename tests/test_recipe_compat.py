"""What mergekit ignores, and other tools' habits: an error with a line of advice, a note with `compat: mergekit`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from merge.cli import cli
from merge.errors import RecipeError
from merge.jobs.build import build_plan
from merge.output.manifest import MANIFEST
from merge.planning.load import load_recipe, parse_pipeline, parse_recipe
from merge.quoting import excerpt

# What model cards on the hub write: weights for methods that have none, settings of other methods, settings at the top.
STOCK = """\
merge_method: model_stock
base_model: ./base
models:
  - model: ./a
    parameters:
      weight: [{filter: mlp, value: [1, 2]}, {value: 1}]
  - model: ./b
    parameters: {weight: 0.5, normalize: true}
parameters: {int8_mask: true, allow_negative_weights: false, filter_wise: false, lambda: 1.0}
normalize: true
smooth: false
"""
IGNORED = (
    'mergekit ignores "weight" (lines 6 and 8), "normalize" (lines 8 and 10), "allow_negative_weights" (line 9), '
    '"lambda" (line 9), "smooth" (line 11)'
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Path:
    make_model(tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        make_model(tmp_path / name, seed=seed, base=tmp_path / "base", delta=0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text, "r.yaml")
    return raised.value


def test_strict_is_the_default_and_names_in_one_line_what_mergekit_ignores(models: Path) -> None:
    error = refused(STOCK)
    assert [problem.where for problem in error.problems] == [f"r.yaml:{n}" for n in (6, 8, 8, 9, 9, 10, 11)]
    assert error.advice == (
        f'r.yaml: {IGNORED}; "compat: mergekit" in the recipe, or --compat mergekit, does so too and notes it',
    )
    assert str(error).endswith(error.advice[0])


@pytest.mark.parametrize("how", ["argument", "key", "pipeline"])
def test_compat_turns_them_into_one_note(models: Path, how: str) -> None:
    if how == "argument":
        recipe = parse_recipe(STOCK, "r.yaml", compat="mergekit")
    elif how == "key":
        recipe = parse_recipe(STOCK + "compat: mergekit\n", "r.yaml")
    else:
        (stage,) = parse_pipeline(STOCK, "r.yaml", "mergekit").stages
        recipe = stage.recipe
    assert recipe.compat == "mergekit"
    assert recipe.notes == (f"compat: {IGNORED.replace('mergekit ignores', 'mergekit: ignored')}",)
    assert recipe.models[0].parameters == {}


def test_compat_is_on_record_in_the_manifest(models: Path, run_cli: Callable[..., Any]) -> None:
    (models / "r.yaml").write_text(STOCK)
    assert run_cli(["run", "r.yaml", "-o", "out"]).code == 2
    done = run_cli(["run", "r.yaml", "-o", "out", "--compat", "mergekit"])
    assert (done.code, f"note: compat: {IGNORED.replace('mergekit ignores', 'mergekit: ignored')}" in done.stderr) == (
        0,
        True,
    )
    manifest = json.loads((models / "out" / MANIFEST).read_bytes())
    assert manifest["compat"] == "mergekit"
    assert any(note.startswith("compat: mergekit: ignored") for note in manifest["notes"])


def test_misspelt_keys_and_wrong_values_stay_errors_with_compat(models: Path) -> None:
    text = STOCK.replace("weight: 0.5, normalize", "wieght: 0.5, filter_wize").replace(
        "filter_wise: false", "filter_wise: 3"
    )
    with pytest.raises(RecipeError) as raised:
        parse_recipe(text + "dtpye: float16\n", "r.yaml", compat="mergekit")
    assert [str(problem).split(";")[0] for problem in raised.value.problems] == [
        'r.yaml:8: unknown key "filter_wize"',
        'r.yaml:9: "filter_wise" must be true or false, not 3',
        'r.yaml:12: unknown key "dtpye"',
    ]
    assert raised.value.advice == ()


def test_an_unknown_tool_is_refused() -> None:
    assert "unknown compat" in str(refused(STOCK.replace("./", "org/") + "compat: mergkit\n"))


METHODS = [
    "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1, int8_mask: true}",
    "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}]\nparameters: {t: 0.5, int8_mask: false}",
    "merge_method: model_stock\nbase_model: ./base\nmodels: [{model: ./a, parameters: {int8_mask: 1}}, {model: ./b}]",
    "merge_method: passthrough\nmodels: [{model: ./a}]\nparameters: {int8_mask: true}",
]


@pytest.mark.parametrize("text", METHODS, ids=lambda text: text.split()[1])
def test_int8_mask_is_accepted_under_every_method_and_changes_nothing(models: Path, text: str) -> None:
    with_it = build_plan(parse_recipe(text, "r.yaml"))
    without = build_plan(parse_recipe(re.sub(r"(, )?int8_mask: \w+", "", text), "r.yaml"))
    assert [step.parameters for step in with_it.steps] == [step.parameters for step in without.steps]
    assert not any("int8_mask" in step.parameters for step in with_it.steps)


def test_int8_mask_is_still_a_flag() -> None:
    text = METHODS[0].replace("./", "org/").replace("true", "many")
    assert '"int8_mask" must be true or false, not "many"' in str(refused(text))


def test_the_old_prefix_of_a_tokenizer_source_gets_a_hint_and_is_read_with_compat(models: Path) -> None:
    text = METHODS[0] + "\ntokenizer_source: model:./a\n"
    assert 'r.yaml:4: "tokenizer_source" names a model without "model:" before it; write ./a' in str(refused(text))
    assert parse_recipe(text, "r.yaml", compat="mergekit").tokenizer_source == "./a"


def test_an_empty_prompt_is_a_prompt() -> None:
    text = "base_model: org/a\nexperts:\n- {source_model: org/a, positive_prompts: ['']}\n"
    text += "- {source_model: org/b, positive_prompts: [x]}\n"
    recipe = parse_recipe(text)
    assert recipe.mixture is not None
    assert recipe.mixture.experts[0].positive == ("",)


def test_a_slice_without_layers_gives_what_stands_outside_them(models: Path) -> None:
    slices = "[{sources: [{model: ./a, layer_range: [0, 2]}]}, {sources: [{model: ./b, layer_range: [2, 2]}]}]"
    plan = build_plan(parse_recipe(f"merge_method: passthrough\nslices: {slices}", "r.yaml"))
    taken = {step.name: plan.models[step.models[0]].ref for step in plan.steps}
    assert {name for name, model in taken.items() if model == "./b"} == {"model.norm.weight", "lm_head.weight"}
    assert "slice 2 holds no layer; it gives what stands after the layers" in plan.notes


def test_all_that_is_wrong_with_a_recipe_and_its_models_is_one_round(models: Path) -> None:
    (models / "lora").mkdir()
    (models / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (models / "empty").mkdir()
    entries = ["./a", "./nope", "base/nope", "./lora", "empty"]
    lines = "".join(f"- model: {name}\n  parameters: {{weight: 1}}\n" for name in entries)
    text = f"merge_method: linear\nmodels:\n{lines}".replace("weight: 1", "wieght: 1", 1) + "normalise: true\n"
    found = [str(problem) for problem in refused(text).problems]
    assert [problem.split(":", 2)[1] for problem in found] == ["4", "5", "7", "9", "11", "13"]
    for words, problem in zip(
        ['"wieght"', "./nope", '"base/nope"', "is an adapter", "is empty", '"normalise"'], found, strict=True
    ):
        assert words in problem


def test_adapters_and_damaged_models_are_one_round_where_the_recipe_is_right(models: Path) -> None:
    (models / "lora").mkdir()
    (models / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (models / "empty").mkdir()
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./a}, {model: ./lora},\n {model: ./empty}]\n"
    )
    (models / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        build_plan(load_recipe("r.yaml"))
    first, second = map(str, raised.value.problems)
    assert first.startswith("r.yaml:3: ./lora is a LoRA adapter, and not all")
    assert second.startswith("r.yaml:4: ")
    assert "is empty" in second


@pytest.mark.parametrize("verb", [["convert"], ["lora", "fold"], ["transplant"]], ids=" ".join)
def test_verbs_without_a_recipe_name_no_line_of_one(models: Path, verb: list[str]) -> None:
    (models / "m.gguf").touch()
    for name, said in (
        ("m.gguf", "m.gguf: is no GGUF file that can be read (it ends within its header)"),
        ("./nope", "no directory"),
    ):
        done = CliRunner().invoke(cli, [*verb, name, *(["a"] if verb != ["convert"] else []), "-o", "out"])
        message = str(done.exception)
        assert said in message
        assert "line " not in message


def test_what_others_wrote_is_cut_behind_a_word() -> None:
    assert excerpt("short") == "short"
    assert excerpt("some words that go on " * 20, 30) == "some words that go on some ..."
    assert excerpt("x" * 50, 30) == "x" * 30 + " ..."
