"""regmean and fisher: their arithmetic, their recipes, and statistics that do not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import write_safetensors
from safetensors.numpy import load_file

from merge import build_plan, parse_recipe, run_plan
from merge.errors import NumbersError, RecipeError, SourceChanged
from merge.methods.fisher import fisher
from merge.methods.regmean import regmean
from merge.plan import Plan

Arrays = dict[str, npt.NDArray[np.float32]]


# ---- methods


def test_regmean_of_linear_regressors_is_the_pooled_solution() -> None:
    random = np.random.default_rng(1)
    truth = random.standard_normal((3, 8))
    inputs = [random.standard_normal((50, 8)) @ random.standard_normal((8, 8)) for _ in range(3)]
    outputs = [x @ (truth + 0.3 * random.standard_normal(truth.shape)).T for x in inputs]
    each = [np.linalg.lstsq(x, y)[0].T for x, y in zip(inputs, outputs, strict=True)]
    pooled = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs))[0].T
    grams = tuple(torch.from_numpy(x.T @ x) for x in inputs)
    got = regmean(torch.from_numpy(np.stack(each)), alpha=1.0, _statistics=grams)
    np.testing.assert_allclose(got.numpy(), pooled, rtol=1e-10, atol=1e-12)


def test_regmean_with_alpha_is_the_papers_formula_and_unseen_inputs_are_averaged() -> None:
    random = np.random.default_rng(2)
    weights = random.standard_normal((2, 3, 5)).astype(np.float32)
    inputs = random.standard_normal((2, 40, 5)).astype(np.float32)
    inputs[:, :, 4] = 0
    grams = inputs.transpose(0, 2, 1) @ inputs
    got = regmean(torch.from_numpy(weights), alpha=0.7, _statistics=tuple(map(torch.from_numpy, grams))).numpy()
    scaled = 0.7 * grams.astype(np.float64) + 0.3 * np.stack([np.diag(np.diag(gram)) for gram in grams])
    seen = scaled[:, :4, :4]
    expected = sum(w[:, :4] @ g for w, g in zip(weights, seen, strict=True)) @ np.linalg.inv(seen.sum(axis=0))
    np.testing.assert_allclose(got[:, :4], expected, rtol=1e-6)
    np.testing.assert_allclose(got[:, 4], weights.mean(axis=0)[:, 4], rtol=1e-6)


def test_regmean_of_a_singular_system_fits_what_was_seen() -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((2, 3, 6))
    inputs = random.standard_normal((2, 2, 6))  # two rows for each, of six dimensions
    grams = tuple(torch.from_numpy(x.T @ x) for x in inputs)
    got = regmean(torch.from_numpy(weights), alpha=1.0, _statistics=grams).numpy()
    for own, x in zip(weights, inputs, strict=True):
        np.testing.assert_allclose(x @ got.T, x @ own.T, rtol=1e-6)


def test_fisher_weighs_each_entry_and_holds_the_floor() -> None:
    models = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    information = (torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    got = fisher(models, weight=(1.0, 1.0), epsilon=0.5, _statistics=information)
    np.testing.assert_allclose(got.numpy(), [1.5, 7 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(
        fisher(models, weight=(1.0, 3.0), _statistics=information[:1] * 2).numpy(), [2.5, 2.5, 2.5], rtol=1e-6
    )


# ---- recipes


@pytest.fixture
def pair(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """Models a and b with statistics of both kinds; those of b equal a's in their Fisher information."""
    random = np.random.default_rng(4)
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
        tensors = load_file(tmp_path / name / "model.safetensors")
        grams, information = {}, {}
        for tensor, value in tensors.items():
            information[f"fisher.{tensor}"] = (np.full(value.shape, 0.25, np.float32), "float32")
            if "proj" in tensor:
                x = random.standard_normal((40, value.shape[1])).astype(np.float32)
                grams[f"gram.{tensor}"] = (x.T @ x, "float32")
        write_safetensors(tmp_path / f"{name}.gram.safetensors", grams)
        write_safetensors(tmp_path / f"{name}.fisher.safetensors", information)
    return tmp_path


def recipe(root: Path, method: str, kind: str = "", more: str = "") -> str:
    kind = kind or {"regmean": "gram"}.get(method, method)
    models = "".join(
        f"  - model: {root / name}\n    statistics: {root / f'{name}.{kind}.safetensors'}\n" for name in "ab"
    )
    return f"merge_method: {method}\nmodels:\n{models}{more}"


def merged(root: Path, text: str, out: str) -> Arrays:
    run_plan(build_plan(parse_recipe(text)), root / out)
    return load_file(root / out / "model.safetensors")


def test_a_regmean_recipe_solves_linear_layers_and_averages_the_rest(pair: Path) -> None:
    got = merged(pair, recipe(pair, "regmean"), "out")
    a, b = (load_file(pair / name / "model.safetensors") for name in "ab")
    grams = [load_file(pair / f"{name}.gram.safetensors") for name in "ab"]
    for name, value in got.items():
        own = tuple(torch.from_numpy(gram[f"gram.{name}"]) for gram in grams if f"gram.{name}" in gram)
        expected = regmean(torch.from_numpy(np.stack([a[name], b[name]])), _statistics=own)
        np.testing.assert_array_equal(value, expected.float().numpy())
        assert np.allclose(value, (a[name] + b[name]) / 2) == ("proj" not in name)
    manifest = json.loads((pair / "out" / "merge_manifest.json").read_bytes())
    assert len(manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]["statistics"]) == 2
    assert "statistics" not in manifest["tensors"]["model.norm.weight"]


def test_equal_fisher_information_gives_linear(pair: Path) -> None:
    got = merged(pair, recipe(pair, "fisher"), "fisher")
    text = (
        f"merge_method: linear\nmodels: [{{model: {pair / 'a'}}}, {{model: {pair / 'b'}}}]\nparameters: {{weight: 1}}"
    )
    for name, value in merged(pair, text, "linear").items():
        np.testing.assert_allclose(got[name], value, rtol=1e-7)


def test_slices_take_the_statistics_of_the_layer_they_take(pair: Path) -> None:
    sources = ", ".join(
        f"{{model: {pair / name}, layer_range: {layers}, statistics: {pair / f'{name}.gram.safetensors'}}}"
        for name, layers in (("a", [1, 2]), ("b", [0, 1]))
    )
    plan = build_plan(parse_recipe(f"merge_method: regmean\nslices: [{{sources: [{sources}]}}]"))
    step = next(step for step in plan.steps if step.name == "model.layers.0.mlp.up_proj.weight")
    assert [ref.name for ref in step.statistics] == [f"gram.model.layers.{i}.mlp.up_proj.weight" for i in (1, 0)]


def test_a_plan_carries_its_statistics_through_json_and_counts_their_bytes(pair: Path) -> None:
    plan = build_plan(parse_recipe(recipe(pair, "fisher")))
    assert Plan.from_json(plan.to_json()) == plan
    without = dataclasses.replace(plan, steps=tuple(dataclasses.replace(step, statistics=()) for step in plan.steps))
    assert plan.bytes_read == 2 * without.bytes_read
    assert [Path(file.path).name for file in plan.statistics_files] == ["a.fisher.safetensors", "b.fisher.safetensors"]


def test_statistics_that_change_after_the_plan_are_an_error(pair: Path) -> None:
    plan = build_plan(parse_recipe(recipe(pair, "fisher")))
    with open(pair / "a.fisher.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(SourceChanged):
        run_plan(plan, pair / "out")


def test_statistics_with_nan_are_an_error(pair: Path) -> None:
    tensors = load_file(pair / "a.fisher.safetensors")
    tensors["fisher.model.norm.weight"][2] = np.nan
    write_safetensors(pair / "a.fisher.safetensors", {name: (value, "float32") for name, value in tensors.items()})
    with pytest.raises(NumbersError, match=r"fisher\.model\.norm\.weight: NaN"):
        run_plan(build_plan(parse_recipe(recipe(pair, "fisher"))), pair / "out")


KEY = "model.layers.0.mlp.up_proj.weight"


def change(path: Path, name: str, value: npt.NDArray[np.float32] | None) -> None:
    """Another tensor under that name, or none."""
    tensors = load_file(path)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    write_safetensors(path, {name: (value, "float32") for name, value in tensors.items()})


def nothing(root: Path) -> None:
    pass


PROBLEMS: dict[str, tuple[Callable[[Path], object], Callable[[Path], str], str]] = {
    "missing": (
        nothing,
        lambda root: f"merge_method: regmean\nmodels: [{{model: {root / 'a'}}}]",
        'regmean needs "statistics" for model',
    ),
    "of no use": (
        nothing,
        lambda root: recipe(root, "linear", "gram", "parameters: {weight: 1}"),
        'linear uses no statistics; remove "statistics" of model',
    ),
    "wrong kind": (nothing, lambda root: recipe(root, "regmean", "fisher"), "has fisher, and gram is needed"),
    "no file": (nothing, lambda root: recipe(root, "regmean", "other"), "there is no statistics file"),
    "no text": (
        nothing,
        lambda root: recipe(root, "fisher").replace("statistics: ", "statistics: 3 #"),
        '"statistics" must be a string, not 3',
    ),
    "align": (
        nothing,
        lambda root: recipe(root, "regmean", more="align: permutation\n"),
        '"align" permutes units, so the statistics',
    ),
    "damaged": (
        lambda root: (root / "a.gram.safetensors").write_bytes(b"12345"),
        lambda root: recipe(root, "regmean"),
        "is only 5 bytes long",
    ),
    "shape": (
        lambda root: change(root / "a.gram.safetensors", f"gram.{KEY}", np.ones((3, 3), np.float32)),
        lambda root: recipe(root, "regmean"),
        f"{KEY}: the gram of",
    ),
    "lacking": (
        lambda root: change(root / "b.fisher.safetensors", f"fisher.{KEY}", None),
        lambda root: recipe(root, "fisher"),
        f"{KEY}: the statistics of",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_of_statistics_are_problems_of_the_recipe(pair: Path, case: str) -> None:
    prepare, text, message = PROBLEMS[case]
    prepare(pair)
    with pytest.raises(RecipeError, match=message):
        build_plan(parse_recipe(text(pair), str(pair / "recipe.yaml")))


def test_such_a_problem_ends_with_exit_code_2_and_its_line(pair: Path, call_cli: Callable[..., Any]) -> None:
    (pair / "recipe.yaml").write_text(recipe(pair, "regmean", "fisher"))
    code, out, err = call_cli(["run", "recipe.yaml"])
    assert (code, out) == (2, "")
    assert "recipe.yaml:3: " in err
