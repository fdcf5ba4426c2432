"""What a recipe may say, and what it becomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from merge.errors import RecipeError
from merge.methods.registry import all_methods
from merge.planning.load import load_recipe, parse_recipe
from merge.recipe import Conditional, ModelRef, Recipe

# As mergekit's users write them.
LINEAR = """\
models:
  - model: org/orca
    parameters:
      weight: 1.0
  - model: org/wizard
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""
GRADIENT_SLERP = """\
slices:
  - sources:
      - model: org/orca
        layer_range: [0, 40]
      - model: org/platypus
        layer_range: [0, 40]
merge_method: slerp
base_model: org/orca
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # for the rest
dtype: float16
"""
TIES = """\
models:
  - model: org/orca # no parameters needed for the base
  - model: org/platypus
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/wizard
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/orca
parameters:
  normalize: false
  int8_mask: true
dtype: bfloat16
"""
STACK = """\
slices:
  - sources:
    - model: org/orca
      layer_range: [0, 24]
  - sources:
    - model: org/platypus
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
"""


def linear(weight: str = "1", more: str = "") -> Recipe:
    return parse_recipe(f"merge_method: linear\nmodels: [{{model: org/a, parameters: {{weight: {weight}}}}}]\n{more}")


@pytest.mark.parametrize("text", [LINEAR, GRADIENT_SLERP, TIES, STACK])
def test_recipes_of_mergekit_parse_unchanged(text: str) -> None:
    assert parse_recipe(text).text == text


@pytest.mark.parametrize("name", all_methods())
def test_the_example_of_every_method_parses(name: str) -> None:
    assert parse_recipe(all_methods()[name].example).merge_method == name


def test_a_linear_recipe_becomes_plain_data() -> None:
    recipe = parse_recipe(LINEAR, "linear.yaml")
    assert [source.model for source in recipe.models] == [
        ModelRef("org/orca", "org/orca"),
        ModelRef("org/wizard", "org/wizard"),
    ]
    assert [source.parameters for source in recipe.models] == [{"weight": 1.0}, {"weight": 0.3}]
    assert (recipe.dtype, recipe.out_dtype, recipe.base_model, recipe.seed, recipe.allow) == ("F16", None, None, 0, ())
    assert recipe.where("models.1.parameters.weight") == "linear.yaml:7"
    assert recipe.models[1].line == 5


def test_gradients_and_filters_keep_their_order() -> None:
    t = parse_recipe(GRADIENT_SLERP).parameters["t"]
    assert t == (
        Conditional("self_attn", (0.0, 0.5, 0.3, 0.7, 1.0)),
        Conditional("mlp", (1.0, 0.5, 0.7, 0.3, 0.0)),
        Conditional(None, 0.5),
    )


def test_a_stack_keeps_its_layer_ranges() -> None:
    assert [piece.sources[0].layer_range for piece in parse_recipe(STACK).slices] == [(0, 24), (20, 40)]


def test_our_own_keys() -> None:
    recipe = linear(more="name: my merge\nseed: 7\nallow: [overflow, missing_tensors, overflow]\n")
    assert (recipe.name, recipe.seed, recipe.allow) == ("my merge", 7, ("overflow", "missing_tensors"))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1.0),
        ("1e-3", 1e-3),  # a text for YAML 1.1
        ("-1.5E+2", -150.0),
        ('"0.5"', 0.5),
        ("[0.5]", (0.5,)),
        ("[0, 1]", (0.0, 1.0)),
        ("{value: 2}", (Conditional(None, 2.0),)),
        ('[{filter: "*", value: [1, 2]}]', (Conditional("*", (1.0, 2.0)),)),
        ('[{filter: "", value: 1}]', (Conditional("", 1.0),)),
        ("[{filter: null, value: 1}]", (Conditional(None, 1.0),)),
    ],
)
def test_a_number_may_be_written_in_many_ways(written: str, value: object) -> None:
    setting = linear(written).models[0].parameters["weight"]
    assert setting == value
    assert isinstance(setting, float | tuple)


@pytest.mark.parametrize(
    ("written", "value"),
    [("true", True), ("no", False), ("1", True), ("0.0", False), ('"true"', True), ("[true, false]", (True, False))],
)
def test_a_boolean_may_be_one_or_zero(written: str, value: object) -> None:
    assert linear(more=f"parameters: {{normalize: {written}}}").parameters == {"normalize": value}


@pytest.mark.parametrize(
    ("written", "value"), [("true", True), ("0", False), ("l1", "l1"), ("[true, l1]", (True, "l1"))]
)
def test_choices_may_mix_booleans_and_words(written: str, value: object) -> None:
    text = TIES.replace("int8_mask: true", f"rescale: {written}")
    assert parse_recipe(text).parameters["rescale"] == value


@pytest.mark.parametrize(
    ("written", "name"),
    [("bfloat16", "BF16"), ("torch.float32", "F32"), ("half", "F16"), ("float8_e4m3fn", "F8_E4M3"), ("null", None)],
)
def test_dtypes_go_by_their_torch_names(written: str, name: str | None) -> None:
    recipe = linear(more=f"dtype: {written}\nout_dtype: {written}")
    assert (recipe.dtype, recipe.out_dtype) == (name, name)


def test_null_is_the_same_as_not_given() -> None:
    nothing = "base_model:\nparameters:\nslices:\ntokenizer:\nchat_template:\nname:\nseed:\nallow:\nmodules:\n"
    assert linear(more=nothing).parameters == {}


def test_anchors_and_merge_keys_are_written_out() -> None:
    text = "models: [{model: a/a, parameters: &p {weight: 2}}, {model: a/b, parameters: {<<: *p}}, "
    text += "{model: a/c, parameters: {<<: [*p, {weight: 9}], weight: 3}}]\nmerge_method: linear\n"
    assert [source.parameters["weight"] for source in parse_recipe(text).models] == [2.0, 2.0, 3.0]


def test_a_required_value_may_stand_at_any_level() -> None:
    assert parse_recipe("merge_method: linear\nmodels: [{model: a/b}]\nparameters: {weight: 1}").parameters
    sources = "[{model: a/b, layer_range: [0, 2]}, {model: a/c, layer_range: [1, 3]}]"
    text = f"merge_method: linear\nslices: [{{sources: {sources}, parameters: {{weight: 1}}}}]"
    assert parse_recipe(text).slices[0].parameters == {"weight": 1.0}


def test_the_same_model_may_be_listed_twice() -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a/b}, {model: a/b}]"
    assert len(parse_recipe(text).models) == 2


def test_weights_may_cancel_where_nothing_is_divided_by_their_sum() -> None:
    text = "merge_method: linear\nparameters: {normalize: NO}\nmodels: "
    text += "[{model: a/b, parameters: {weight: 1}}, {model: a/c, parameters: {weight: -1}}]"
    assert parse_recipe(text)


def test_a_base_that_is_an_input_is_added_where_it_is_not_listed() -> None:
    text = "merge_method: slerp\nbase_model: a/b\nmodels: [{model: a/c}]\nparameters: {t: 0.5}"
    assert [source.model.path for source in parse_recipe(text).models] == ["a/c", "a/b"]


def test_a_base_of_task_vectors_is_not_added() -> None:
    text = "merge_method: ties\nbase_model: a/b\nmodels: [{model: a/c, parameters: {weight: 1}}]"
    assert [source.model.path for source in parse_recipe(text).models] == ["a/c"]


def test_a_base_of_a_stack_is_only_the_donor() -> None:
    assert parse_recipe(STACK + "base_model: org/other\n").base_model == ModelRef("org/other", "org/other")


@pytest.mark.parametrize(
    "source",
    ["tokenizer_source: base", "tokenizer_source: org/a", "tokenizer: {source: base}", "tokenizer: {source: org/a}"],
)
def test_the_tokenizer_may_come_from_a_model_of_the_recipe(source: str) -> None:
    assert linear(more=source).tokenizer_source in ("base", "org/a")


# ---- files


def test_a_recipe_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("\ufeff" + LINEAR, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "recipes/mine", "recipes/mine.yaml", Path("recipes/mine.yaml")):
        assert load_recipe(name).where("dtype") == "recipes/mine.yaml:9"
    with pytest.raises(RecipeError, match=r'no such recipe file; did you mean "recipes/mine.yaml"\?'):
        load_recipe("recipes/mien.yaml")
    with pytest.raises(RecipeError, match="this is a directory"):
        load_recipe("recipes")


def test_lines_are_right_with_windows_line_ends() -> None:
    assert parse_recipe(LINEAR.replace("\n", "\r\n"), "r").where("dtype") == "r:9"


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = f"import sys; from merge import parse_recipe; parse_recipe({LINEAR!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numba", "numpy", "transformers", "huggingface_hub"}.intersection(modules)
