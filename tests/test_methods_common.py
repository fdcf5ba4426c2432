"""What every registered method must do; a new method is tested by being there."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from conftest import encode, write_safetensors
from memory_tensor import run_fused, run_reference, to_raw
from safetensors.numpy import load_file

from merge import build_plan, parse_recipe, run_plan
from merge.methods import Method, Parameter, all_methods
from merge.plan import Plan

# Those of adapters take no models; tests/test_adapter_recipes.py has them.
METHODS = {name: method for name, method in all_methods().items() if method.inputs != "adapters"}
# What n copies of a model give, at default parameters and weights of 1/n, where that is not the model.
OTHERWISE = {
    "pcb": "competition keeps the entries of largest score and drops the rest",
    "tsv": "each copy keeps its share of the strongest directions only",
    "iso_c": "all directions become equally strong",
    "iso_cts": "all directions become equally strong",
}
USUAL: dict[str, Any] = {"t": 0.35}


def n_models(method: Method, wanted: int = 3) -> int:
    fewest, most = method.n_models
    return max(fewest, min(wanted, most or wanted))


def usual(method: Method, n: int) -> dict[str, Any]:
    """Default parameters, weights of 1/n, and a value for what has no default."""

    def one(parameter: Parameter) -> Any:
        if parameter.name == "weight":
            return 1 / n
        if parameter.name == "epsilon" and parameter.per_model:
            return 0.0  # DELLA's probabilities of keeping must stay within 0 and 1
        return USUAL[parameter.name] if parameter.required else parameter.default

    return {
        parameter.name: (one(parameter),) * n if parameter.per_model else one(parameter)
        for parameter in method.parameters
    }


def arguments(method: Method, n: int) -> dict[str, Any]:
    """The same as keywords of the function, with random keys."""
    keywords = {("lambda_" if name == "lambda" else name): value for name, value in usual(method, n).items()}
    return keywords | ({"_keys": tuple(range(5, 5 + n))} if method.random else {})


def ways(method: Method, raw: npt.NDArray[Any], shape: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    """The result of the definition and, where there is one, of the kernel."""
    keywords = arguments(method, len(raw) - (method.inputs == "deltas"))
    results = [run_reference(method, raw, shape, **keywords)]
    if method.fused:
        results.append(run_fused(method, raw, 64, shape=shape, **keywords))
    return results


def rows(method: Method, size: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """(source, size): random inputs, fine-tunes of the base where the method takes task vectors"""
    random = np.random.default_rng(seed)
    n = n_models(method) + (method.inputs == "deltas")
    values = random.standard_normal(size) * 0.05 + random.standard_normal((n, size)) * 0.01
    return values.astype(np.float32)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_a_model_give_that_model(name: str) -> None:
    method = METHODS[name]
    values = rows(method, 12 * 8)
    first = 1 if method.inputs == "deltas" else 0
    values[first:] = values[first]
    for got in ways(method, values, (12, 8)):
        if name in OTHERWISE:
            assert not np.allclose(got, values[first], rtol=1e-6, atol=1e-8), "take it out of OTHERWISE"
        else:
            np.testing.assert_allclose(got, values[first], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_changed_and_the_result_is_the_same_again(name: str) -> None:
    method = METHODS[name]
    values = rows(method, 12 * 8)
    before = values.copy()
    once, again = ways(method, values, (12, 8)), ways(method, values, (12, 8))
    np.testing.assert_array_equal(values, before)
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 1), (3, 0), (0, 3), (1, 9), (9, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_shapes_of_every_kind(name: str, shape: tuple[int, ...]) -> None:
    method = METHODS[name]
    values = rows(method, math.prod(shape))
    results = ways(method, values, shape)
    for got in results:
        assert got.shape == (math.prod(shape),)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_give_zeros(name: str) -> None:
    method = METHODS[name]
    for shape in ((), (5,), (4, 6)):
        for got in ways(method, rows(method, math.prod(shape)) * 0, shape):
            np.testing.assert_array_equal(got, np.zeros(math.prod(shape)))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.fused])
def test_blocks_of_a_matrix_do_not_change_a_bit(name: str) -> None:
    method = METHODS[name]
    raw = to_raw(rows(method, 40 * 24), "BF16")
    keywords = arguments(method, n_models(method))
    whole = run_fused(method, raw, 48, per_block=20, shape=(40, 24), **keywords)
    for per_block in (1, 7):
        np.testing.assert_array_equal(run_fused(method, raw, 48, per_block, (40, 24), **keywords), whole)


def recipe(method: Method, root: Path, more: str = "", with_base: bool = True) -> str:
    """A recipe with default parameters for models named base, m0, m1 ... under a directory."""
    n = n_models(method)
    values = usual(method, n)
    own = {parameter.name for parameter in method.parameters if parameter.per_model}
    names = [f"m{i}" for i in range(n)]
    if method.base == "required" and method.base_is_input:
        names[0] = "base"
    written: dict[str, Any] = {"merge_method": method.name, "seed": 3, "allow": ["unrelated_base", "zero_task_vector"]}
    if method.base == "required" or (method.inputs == "either" and with_base):
        written["base_model"] = str(root / "base")
    written["parameters"] = {k: v for k, v in values.items() if k not in own and v is not None}
    written["models"] = [
        {"model": str(root / name), "parameters": {k: values[k][i] for k in sorted(own) if values[k][i] is not None}}
        | ({"statistics": str(root / name / "statistics" / "all.safetensors")} if method.statistics else {})
        for i, name in enumerate(names)
    ]
    return yaml.safe_dump(written, sort_keys=False) + more


def write_model(path: Path, seed: int, dtype: str) -> None:
    """A model of odd tensors, with no architecture that is known."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    random = np.random.default_rng(seed)
    shapes = {"scalar": (), "one": (1,), "empty": (0,), "vector": (17,), "matrix": (6, 10), "cube": (3, 4, 5)}
    values = {name: random.standard_normal(shape).astype(np.float32) * 0.05 for name, shape in shapes.items()}
    values["zeros"] = np.zeros((4, 4), np.float32)
    stored = {name: (encode(value, dtype), NAMES[dtype]) for name, value in values.items()}
    write_safetensors(path / "model.safetensors", stored)
    statistics = {f"fisher.{name}": (np.square(value), "float32") for name, value in values.items()}
    statistics["gram.matrix"] = (values["matrix"].T @ values["matrix"], "float32")
    (path / "statistics").mkdir()
    write_safetensors(path / "statistics" / "all.safetensors", statistics)


NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_models(root: Path, dtype: str) -> None:
    for seed, name in enumerate(("base", "m0", "m1", "m2")):
        write_model(root / name, seed, dtype)


@pytest.mark.parametrize("dtype", NAMES)
def test_every_dtype_runs_and_is_kept(tmp_path: Path, dtype: str) -> None:
    write_models(tmp_path, dtype)
    for name, method in METHODS.items():
        plan = build_plan(parse_recipe(recipe(method, tmp_path)))
        assert {step.dtype for step in plan.steps} == {dtype}
        run_plan(plan, tmp_path / f"out-{name}")


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_steps_does_not_matter(tmp_path: Path, name: str) -> None:
    write_models(tmp_path, "F32")
    plan = build_plan(parse_recipe(recipe(METHODS[name], tmp_path)))
    there = digests(plan, tmp_path / "there")
    assert digests(dataclasses.replace(plan, steps=plan.steps[::-1]), tmp_path / "back") == there


def digests(plan: Plan, out: Path) -> dict[str, int]:
    run_plan(plan, out)
    return {name: zlib.crc32(value.tobytes()) for name, value in load_file(out / "model.safetensors").items()}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.inputs == "either"])
def test_an_optional_base_makes_task_vectors(tmp_path: Path, make_model: Callable[..., Path], name: str) -> None:
    """With a base the inputs are task vectors; listing it among the models changes nothing."""
    method = METHODS[name]
    make_model(tmp_path / "base", seed=9)
    for i in range(n_models(method)):
        make_model(tmp_path / f"m{i}", seed=i, base=tmp_path / "base", delta=0.01)

    def run(out: str, text: str) -> dict[str, npt.NDArray[np.float32]]:
        run_plan(build_plan(parse_recipe(text)), tmp_path / out)
        return load_file(tmp_path / out / "model.safetensors")

    plain, based = recipe(method, tmp_path, with_base=False), recipe(method, tmp_path)
    for step in build_plan(parse_recipe(plain)).steps:
        assert step.base is None
    for step in build_plan(parse_recipe(based)).steps:
        assert step.base is not None
        assert len(step.inputs) == n_models(method)
    with_base, without = run("based", based), run("plain", plain)
    listed = run("listed", based.replace("models:\n", f"models:\n- model: {tmp_path / 'base'}\n"))
    n, key = n_models(method), "model.layers.0.mlp.up_proj.weight"
    sources = [load_file(tmp_path / name / "model.safetensors") for name in ("base", *(f"m{i}" for i in range(n)))]
    stacked = np.stack([source[key].reshape(-1) for source in sources])
    shape = sources[0][key].shape
    np.testing.assert_allclose(
        with_base[key].reshape(-1), run_reference(method, stacked, shape, **arguments(method, n)), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        without[key].reshape(-1),
        run_reference(method, stacked[1:], shape, **arguments(method, n)),
        rtol=1e-5,
        atol=1e-7,
    )
    for tensor, value in with_base.items():
        np.testing.assert_array_equal(value, listed[tensor])
    assert not np.array_equal(with_base[key], without[key])
