"""Model references: directories with `@` and `+` in their paths, hub ids, revisions, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merge.errors import RecipeError
from merge.jobs.build import build_plan
from merge.planning.load import load_recipe, parse_recipe
from merge.recipe import ModelRef, Recipe, parse_reference


def linear(model: str) -> Recipe:
    text = f"merge_method: linear\nmodels:\n- {{model: {model}, parameters: {{weight: 1}}}}"
    return parse_recipe(text, "r.yaml")


def test_a_hub_id_may_have_a_revision() -> None:
    assert parse_reference("org/name@refs/pr/3") == ModelRef("", "org/name", "refs/pr/3")
    assert parse_reference("gpt2") == ModelRef("", "gpt2")


def test_an_adapter_follows_the_last_plus() -> None:
    found = parse_reference("org/base@main+org/lora@v2")
    assert found == ModelRef("", "org/base", "main", ModelRef("", "org/lora", "v2"))
    assert found.text == "org/base@main+org/lora@v2"


@pytest.mark.parametrize("name", ["a@b", "a+b", "a+b@c", "a@b+c", "plain"])
def test_a_directory_may_have_at_and_plus_in_its_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    expected = ModelRef("", str(tmp_path / name))
    assert parse_reference(name) == parse_reference(f"./{name}") == parse_reference(str(tmp_path / name)) == expected


def test_a_directory_may_have_an_adapter_after_it(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert parse_reference(f"{tmp_path}/a+b+org/lora").adapter == ModelRef("", "org/lora")


def test_the_working_directory_is_looked_in_first_then_the_recipe_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here/a", "there/a", "there/b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert parse_reference("a", tmp_path / "there").path == str(tmp_path / "here" / "a")
    assert parse_reference("b", tmp_path / "there").path == str(tmp_path / "there" / "b")


def test_a_model_may_be_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "x@y").mkdir()
    assert linear("{model: {path: org/a, revision: v1}}").models[0].model == ModelRef("", "org/a", "v1")
    assert linear("{model: org/a@v1}").models[0].model == ModelRef("", "org/a", "v1")
    assert linear(f'{{model: {{path: "{tmp_path}/x@y"}}}}').models[0].model.path == f"{tmp_path}/x@y"


def test_a_misspelt_directory_is_named_with_the_one_that_was_meant(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("math", "code", "base"):
        make_model(tmp_path / "family" / name)
    text = """\
merge_method: ties
base_model: family/base
models:
  - {model: family/maht, parameters: {weight: 1, density: 0.5}}
  - {model: famly/code, parameters: {weight: 1, dnsity: 0.5}}
  - {model: codes, parameters: {weight: 1, density: 0.5}}
"""
    monkeypatch.chdir(tmp_path)
    maht, famly, codes = (
        f'r.yaml:{line}: there is no directory "{name}", nor beside the recipe in "."'
        for line, name in ((4, "family/maht"), (5, "famly/code"), (6, "codes"))
    )
    models = [f'{maht}; did you mean "family/math"?', f'{famly}; did you mean "family/code"?', codes]
    typo = 'r.yaml:5: unknown key "dnsity"; did you mean "density"?'
    for written, expected in ((text, {*models, typo}), (text.replace("dnsity", "density"), set(models))):
        Path("r.yaml").write_text(written)
        with pytest.raises(RecipeError) as caught:
            build_plan(load_recipe("r.yaml"))
        assert set(str(caught.value).split("\n")) == expected


def test_references_are_equal_when_they_mean_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "merge_method: ties\nbase_model: ./a\nmodels: [{model: a}, {model: org/b, parameters: {weight: 1}}]"
    recipe = parse_recipe(text)
    assert recipe.models[0].model == recipe.base_model
    assert recipe.models[0].model.text == "a"


REFERENCES = [
    ("./nope", 'there is no directory "./nope", nor beside the recipe in "."'),
    ("/nope/x+y", 'there is no directory "/nope/x+y"'),
    ("a/b/c", 'there is no directory "a/b/c", nor beside the recipe in "."'),
    ("a/b@", '"a/b@" has nothing after its "@": write org/name@revision'),
    ("+a/b", '"+a/b" has nothing before its "+": write model+adapter'),
    ("a b", '"a b" is neither a directory here nor a hub id such as org/name'),
    ("https://example.org/a/b", '"https://example.org/a/b" is a URL; write the hub id, org/name, or a local directory'),
    ("{model: {path: tests, revision: v1}}", '"tests" is a local directory, which has no revision "v1"; remove it'),
    ("{model: {path: a/b, revision: 12}}", '"revision" must be a string, not 12; quote it: "12"'),
    ("{lora: a/b}", 'a model reference needs the key "model"'),
    ("README.md", '"README.md" is a file; name the model directory that contains it'),
    ('"a\\0b"', "'a\\x00b' is not a model: write a directory or a hub id such as org/name"),
    ("[a]", '"model" must be a string, not a list'),
]


@pytest.mark.parametrize(("written", "message"), REFERENCES)
def test_a_reference_that_names_no_model_is_told_why(
    written: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(RecipeError) as raised:
        linear(written)
    assert str(raised.value) == f"r.yaml:3: {message}"
