"""Recipes of adapters: what is written holds the combined changes, and loads in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_adapters
import yaml
from random_adapters import (
    EMBEDDING,
    F64,
    PREFIX,
    SHAPES,
    assert_close,
    changes,
    nearest,
    plan,
    run,
    total,
    weighted,
    write_adapter,
)
from safetensors.numpy import load_file, save_file

from merge import run_plan
from merge.adapters.files import open_adapter
from merge.engine import factors
from merge.errors import RecipeError
from merge.methods import get_method
from merge.output.manifest import read_manifest
from merge.plan import Plan
from merge.recipe.model import ModelRef

two = random_adapters.two  # fixture


@pytest.mark.parametrize(
    ("method", "parameters", "weights"),
    [
        ("cat", {}, (0.7, -0.4)),
        ("svd", {"rank": 7}, (0.7, -0.4)),
        ("task_arithmetic", {"lambda": 0.5}, (0.35, -0.2)),
        ("task_arithmetic", {"rank": 7}, (0.7, -0.4)),
        ("linear", {}, (0.7 / 0.3, -0.4 / 0.3)),
        ("linear", {"normalize": False}, (0.7, -0.4)),
        ("svd", {"rank": 100, "normalize": True}, (0.7 / 0.3, -0.4 / 0.3)),
    ],
)
def test_sums_are_exact_where_the_rank_holds_them(
    tmp_path: Path, two: tuple[Path, Path], method: str, parameters: dict[str, Any], weights: tuple[float, float]
) -> None:
    got = run(tmp_path / "out", method, [weighted(two[0], 0.7), weighted(two[1], -0.4)], parameters=parameters)
    wanted = total(two, weights)
    assert sorted(got) == sorted(wanted)
    for name, matrix in got.items():
        assert_close(matrix, wanted[name])


def test_rslora_scales_by_the_root_of_the_rank(two: tuple[Path, Path]) -> None:
    tensors = load_file(two[1] / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    assert_close(changes(two[1])[name], 5 / 3**0.5 * b @ a)


def test_ranks_that_differ_are_patterns(tmp_path: Path, two: tuple[Path, Path]) -> None:
    run(tmp_path / "out", "cat", list(two))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.1.mlp.up_proj": 4}
    assert config["target_modules"] == list(changes(tmp_path / "out"))
    assert (config["use_rslora"], config["base_model_name_or_path"]) == (False, "org/base")


def test_a_rank_for_some_modules(tmp_path: Path, two: tuple[Path, Path]) -> None:
    rank = [{"filter": "mlp", "value": 2}, {"value": 5}]
    got = run(tmp_path / "out", "svd", list(two), parameters={"rank": rank})
    for name, matrix in total(two, (1, 1)).items():
        wanted = 2 if "mlp" in name else 5
        adapter = open_adapter(ModelRef("", str(tmp_path / "out")))
        assert adapter.modules[name].rank == min(wanted, 4 if name == "model.layers.1.mlp.up_proj" else 7)
        assert_close(got[name], nearest(matrix, wanted))


def test_svd_keeps_the_largest_rank_and_says_what_of_the_energy(
    tmp_path: Path, two: tuple[Path, Path], call_cli: Callable[..., Any]
) -> None:
    recipe = {"merge_method": "svd", "models": [{"model": str(path)} for path in two]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = call_cli(["run", "r.yaml", "-o", "out"])
    assert done.code == 0, done.stderr
    wanted, got = total(two, (1, 1)), changes(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    whole = kept = 0.0
    shares = {}
    for name, matrix in wanted.items():
        assert_close(got[name], nearest(matrix, 4))
        share = np.sum(np.square(nearest(matrix, 4))) / np.sum(np.square(matrix))
        record = manifest["tensors"][f"{PREFIX}{name}.lora_A.weight"]
        assert record["kept_energy"] == pytest.approx(share, rel=1e-6)
        whole, kept = whole + np.sum(np.square(matrix)), kept + np.sum(np.square(nearest(matrix, 4)))
        shares[name] = share
    least = min(shares, key=lambda name: shares[name])
    assert manifest["adapter"]["kept_energy"] == pytest.approx(kept / whole, rel=1e-6)
    assert manifest["adapter"]["least"]["module"] == least
    assert f"kept {kept / whole:.2%} of the energy over 4 modules; least in {least}, {shares[least]:.2%}" in done.stdout
    shown = call_cli(["plan", "r.yaml"])
    assert "4 modules, rank 4" in shown.stdout
    assert "kept_energy" in shown.stdout


@pytest.mark.parametrize("method", ["cat", "svd", "task_arithmetic", "knots"])
def test_an_adapter_less_itself_is_nothing(tmp_path: Path, two: tuple[Path, Path], method: str) -> None:
    models = [weighted(two[0], 1.0), weighted(two[0], -1.0)]
    more = {"parameters": {"inner": "task_arithmetic", "normalize": False}} if method == "knots" else {}
    got = run(tmp_path / "out", method, models, **more)
    for name, matrix in changes(two[0]).items():
        assert np.linalg.norm(got[name]) <= 1e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("method", ["cat", "svd", "knots", "ties"])
def test_adapters_that_were_not_trained_change_nothing(tmp_path: Path, two: tuple[Path, Path], method: str) -> None:
    """PEFT starts with B = 0."""
    for path in two:
        tensors = load_file(path / "adapter_model.safetensors")
        zeros = {name: 0 * values for name, values in tensors.items() if "lora_B" in name}
        save_file(tensors | zeros, path / "adapter_model.safetensors")
    got = run(tmp_path / "out", method, list(two), parameters={"weight": 1})
    assert all(not matrix.any() for matrix in got.values())


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4}),
        ("dare_ties", {"density": 0.6, "rank": 9}),
        ("dare_linear", {"density": 0.6}),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.05, "rank": 3}),
        ("magmax", {}),
        ("iso_c", {}),  # it has no kernel
    ],
)
def test_methods_of_task_vectors_merge_the_changes_themselves(
    tmp_path: Path, two: tuple[Path, Path], method: str, parameters: dict[str, Any]
) -> None:
    import torch

    from merge.random_keys import random_key

    weight = {} if method == "magmax" else {"weight": 0.8}
    made = plan(method, list(two), parameters={**parameters, **weight}, seed=5)
    run_plan(made, tmp_path / "out")
    definition = get_method(method)
    assert definition is not None
    first, second = changes(two[0]), changes(two[1])
    got = changes(tmp_path / "out")
    for step in made.steps:
        if step.factor != "A":
            continue
        name = step.inputs[0].name
        dense = torch.from_numpy(np.stack([first[name], second.get(name, 0 * first[name])]).astype(np.float32))
        keywords = {("lambda_" if key == "lambda" else key): value for key, value in step.parameters.items()}
        if definition.random:
            keywords["_keys"] = tuple(random_key(5, name, place) for place in range(2))
        wanted = definition.reference(dense, **keywords).numpy()
        total_rank = 4 if name == "model.layers.1.mlp.up_proj" else 7
        assert step.shape[0] == min(parameters.get("rank", total_rank), 16)
        assert_close(got[name], nearest(wanted, step.shape[0]), 1e-5)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_large_matrices_are_truncated_as_well_as_by_a_whole_svd(shape: tuple[int, int], noise: float) -> None:
    """Also where nothing sets the directions that stay apart from the others, and where there are too few of them."""
    import torch

    from merge.kernels import low_rank
    from merge.one_thread import ONE_THREAD

    random = np.random.default_rng(3)
    matrix = random.standard_normal((shape[0], 5)) @ random.standard_normal((5, shape[1]))
    matrix += noise * random.standard_normal(shape)
    with ONE_THREAD:
        found, again = (low_rank.nearest(torch.from_numpy(matrix), 8) for _ in range(2))
    squares = np.square(np.linalg.svd(matrix, compute_uv=False))
    best, whole = squares[:8].sum(), squares.sum()
    assert abs(found.kept - best) <= 1e-9 * whole
    assert found.energy == pytest.approx(whole, rel=1e-9)
    left = matrix - (found.b @ found.a).numpy()
    assert float(np.square(left).sum()) <= whole - best + 2e-9 * whole
    assert torch.equal(found.a, again.a)


def ties_in_numpy(stacked: F64, weights: list[float], density: float) -> F64:
    """TIES by hand: trim each to its largest entries, elect signs, average what agrees."""
    kept = []
    for values in stacked.astype(np.float32):
        k = max(1, int(density * values.size))
        order = np.argsort(-np.abs(values).ravel(), kind="stable")
        mask = np.zeros(values.size, bool)
        mask[order[:k]] = True
        kept.append(np.where(mask.reshape(values.shape), values, 0).astype(np.float64))
    pairs = list(zip(weights, kept, strict=True))
    sign = np.where(sum(w * m for w, m in pairs) >= 0, 1.0, -1.0)
    agree = [(np.sign(w * m) == sign) for w, m in pairs]
    top = sum(np.where(a, w * m, 0) for (w, m), a in zip(pairs, agree, strict=True))
    bottom = sum(np.where(a, w, 0.0) for (w, _), a in zip(pairs, agree, strict=True))
    return np.where(bottom != 0, top / np.where(bottom == 0, 1, bottom), 0)


def knots_in_numpy(first: F64, second: F64, weights: list[float], density: float) -> F64:
    """KnOTS-TIES by hand (arXiv:2410.19735, section 4), on whole matrices."""
    u, s, v = np.linalg.svd(np.hstack([first, second]), full_matrices=False)
    count = int((s > 1e-10 * s[0]).sum())
    aligned = np.stack(np.split(v[:count], 2, axis=1))
    return (u[:, :count] * s[:count]) @ ties_in_numpy(aligned, weights, density)


@pytest.mark.parametrize("rank", [0, 3])
def test_knots_is_the_paper_s_definition(tmp_path: Path, two: tuple[Path, Path], rank: int) -> None:
    more = {"rank": rank} if rank else {}
    got = run(tmp_path / "out", "knots", [two[0], weighted(two[1], 0.5)], parameters={"density": 0.3, **more})
    first, second = changes(two[0]), changes(two[1])
    for name, matrix in first.items():
        wanted = knots_in_numpy(matrix, second.get(name, 0 * matrix), [1.0, 0.5], 0.3)
        assert_close(got[name], nearest(wanted, rank) if rank else wanted, 1e-5)
        assert np.linalg.norm(got[name] - matrix) > 0.1 * np.linalg.norm(matrix)


def test_dense_definitions_of_the_adapters_own_methods_agree(tmp_path: Path, two: tuple[Path, Path]) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj"
    dense = torch.from_numpy(np.stack([changes(path)[name] for path in two]).astype(np.float32))
    settings: dict[str, dict[str, Any]] = {
        "cat": {},
        "svd": {"rank": 5},
        "knots": {"density": (1.0, 1.0), "inner": "task_arithmetic"},
    }
    for method, keywords in settings.items():
        definition = get_method(method)
        assert definition is not None
        wanted = definition.reference(dense, weight=(0.5, 0.75), **keywords).numpy()
        written = {key: value for key, value in keywords.items() if key != "density"}
        got = run(tmp_path / method, method, [weighted(two[0], 0.5), weighted(two[1], 0.75)], parameters=written)
        assert_close(got[name], wanted, 1e-5)


@pytest.mark.parametrize("method", ["ties", "svd", "knots"])
def test_threads_and_a_kill_do_not_change_what_is_written(
    tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    density = {} if method == "svd" else {"density": 0.5}
    made = plan(method, list(two), parameters={"weight": 1, "rank": 3, **density}, dtype="bfloat16")
    assert {step.dtype for step in made.steps} == {"BF16"}
    assert Plan.from_json(made.to_json()) == made
    run_plan(made, tmp_path / "one", threads=1)
    run_plan(made, tmp_path / "four", threads=4)
    written = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "four")]
    assert written[0] == written[1]

    whole, calls = factors._compute, []

    def fails_late(context: Any, step: Any) -> Any:
        calls.append(step.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(context, step)

    monkeypatch.setattr(factors, "_compute", fails_late)
    with pytest.raises(KeyboardInterrupt):
        run_plan(made, tmp_path / "resumed", threads=1)
    monkeypatch.setattr(factors, "_compute", whole)
    report = run_plan(made, tmp_path / "resumed", threads=1)
    assert 0 < report.resumed_tensors < len(made.steps)
    assert (tmp_path / "resumed" / "adapter_model.safetensors").read_bytes() == written[0]
    assert read_manifest(tmp_path / "resumed") == read_manifest(tmp_path / "one")


def test_the_manifest_has_a_digest_for_each_adapter(tmp_path: Path, two: tuple[Path, Path]) -> None:
    run(tmp_path / "first", "cat", list(two))
    write_adapter(two[1], 3, rank=3)
    run(tmp_path / "second", "cat", list(two))
    before, after = (read_manifest(tmp_path / out)["models"] for out in ("first", "second"))
    assert before[0]["digest"] == after[0]["digest"]
    assert before[1]["digest"] != after[1]["digest"]
    assert before[0]["tensors_read"] == 4


def test_whole_tensors_are_averaged_by_the_weights(tmp_path: Path) -> None:
    head = [np.full((5, 16), value, np.float32) for value in (1, 4)]
    settings = {"modules_to_save": ["lm_head"]}
    paths = [write_adapter(tmp_path / str(i), i, saved={"lm_head.weight": head[i]}, **settings) for i in range(2)]
    run(tmp_path / "out", "cat", [weighted(paths[0], 1), weighted(paths[1], 0.5)])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    np.testing.assert_array_equal(saved, np.full((5, 16), 2, np.float32))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    with pytest.raises(
        RecipeError, match=r"lm_head.weight: a whole tensor .* averaged, which weights of \[1.0, -0.5\]"
    ):
        plan("cat", [weighted(paths[0], 1), weighted(paths[1], -0.5)])
    plain = write_adapter(tmp_path / "plain", 3)
    with pytest.raises(RecipeError, match=r"lm_head.weight: saved whole in .*0 \(modules_to_save\) and not in .*plain"):
        plan("cat", [paths[0], plain])
    got = run_plan(plan("cat", [paths[0], plain], allow=["missing_tensors"]), tmp_path / "lenient")
    assert got.tensors == 9


@pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours
def test_peft_loads_it_and_computes_the_sum_of_the_changes(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    pytest.importorskip("peft")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base")
    some = {name: shape for name, shape in SHAPES.items() if ".0." in name}
    a = write_adapter(tmp_path / "a", 1, embedding=(32, 16))
    b = write_adapter(tmp_path / "b", 2, rank=3, shapes=some, use_rslora=True)
    run(tmp_path / "out", "cat", [weighted(a, 0.5), weighted(b, -1.5)], base_model=str(base))
    run(tmp_path / "short", "svd", [weighted(a, 0.5), weighted(b, -1.5)], parameters={"rank": 5})

    def logits(change: Callable[[Any], Any]) -> Any:
        model = change(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
        with torch.no_grad():
            return model(torch.arange(1, 9)[None]).logits

    def folded(weights: dict[str, F64]) -> Callable[[Any], Any]:
        def change(model: Any) -> Any:
            for name, matrix in weights.items():
                turned = matrix.T if name == EMBEDDING else matrix
                model.get_submodule(name).weight.data += torch.from_numpy(turned).float()
            return model

        return change

    def loaded(path: Path) -> Callable[[Any], Any]:
        return lambda model: PeftModel.from_pretrained(model, path)

    wanted = logits(folded(total((a, b), (0.5, -1.5))))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), wanted, rtol=1e-4, atol=1e-5)
    assert (logits(lambda model: model) - wanted).abs().max() > 0.01
    torch.testing.assert_close(
        logits(loaded(tmp_path / "short")), logits(folded(changes(tmp_path / "short"))), rtol=1e-4, atol=1e-5
    )
    config = json.loads((tmp_path / "short" / "adapter_config.json").read_text())
    assert config["rank_pattern"]  # the modules that only one adapter has keep its rank
    again = plan("passthrough", [f"{base}+{tmp_path / 'out'}"])
    run_plan(again, tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(lambda _: model), wanted, rtol=1e-4, atol=1e-5)


def test_the_memory_that_is_predicted_grows_with_what_is_formed(tmp_path: Path, two: tuple[Path, Path]) -> None:
    from merge.engine.memory import predicted_peak

    wide = {"model.layers.0.mlp.up_proj": (3000, 2000)}
    paths = [write_adapter(tmp_path / f"w{i}", i, shapes=wide) for i in range(2)]
    cat, low, dense = (
        predicted_peak(plan(name, list(paths), parameters=set_), 1, 1)
        for name, set_ in (("cat", {}), ("svd", {}), ("ties", {"weight": 1}))
    )
    assert cat < low < dense
    assert dense - low > 2 * 4 * 3000 * 2000


def test_the_methods_are_listed_as_those_of_adapters(call_cli: Callable[..., Any]) -> None:
    rows = [line.split() for line in call_cli(["methods"]).stdout.splitlines()]
    assert [row[2] for row in rows if row and row[0] in ("cat", "svd", "knots")] == ["adapters"] * 3
    assert "LoRA adapters: 1 or more" in call_cli(["methods", "svd"]).stdout


def test_nothing_cut_off_is_not_reported(tmp_path: Path, two: tuple[Path, Path]) -> None:
    made = plan("cat", list(two))
    report = run_plan(made, tmp_path / "out")
    assert report.adapter is None
    assert factors.summary(made.steps, {i: {} for i in range(len(made.steps))}) is None
    assert not any("kept_energy" in note for note in made.notes)
