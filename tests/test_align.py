"""align: permutation: what was only renumbered is found again, to the byte, and what is not known stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import llama_config, write_json, write_safetensors
from safetensors import safe_open
from safetensors.numpy import load_file

import merge.jobs.alignment.find
from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.errors import RecipeError
from merge.findings.alignment import PermutableModule
from merge.plan import Plan
from merge.sources.ordered import read_ordered

RECIPE = """
merge_method: linear
models: [{{model: {root}/a}}, {{model: {root}/b}}]
parameters: {{weight: 1}}
align: permutation
"""
HIDDEN, INNER, LAYERS, WIDTH = 16, 24, 2, 4


def llama(seed: int, heads: int = 4, groups: int = 2, bias: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        values = random.standard_normal(shape, np.float32) * np.float32(0.3)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bfloat16 holds them too

    tensors = {"model.embed_tokens.weight": normal(32, HIDDEN), "model.norm.weight": normal(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = normal(HIDDEN)
        for name, n in (("q", heads), ("k", groups), ("v", groups)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(n * WIDTH, HIDDEN)
            if bias:
                tensors[f"{at}self_attn.{name}_proj.bias"] = normal(n * WIDTH)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(HIDDEN, heads * WIDTH)
        for name in ("gate", "up"):
            tensors[f"{at}mlp.{name}_proj.weight"] = normal(INNER, HIDDEN)
        tensors[f"{at}mlp.down_proj.weight"] = normal(HIDDEN, INNER)
    return tensors | {"lm_head.weight": normal(32, HIDDEN)}


def renumbered(tensors: dict[str, np.ndarray], heads: int = 4, groups: int = 2, seed: int = 9) -> dict[str, np.ndarray]:
    """The same model with its neurons, KV groups and query heads in another order."""
    random = np.random.default_rng(seed)
    made = dict(tensors)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        units = random.permutation(INNER)
        for name in ("gate", "up"):
            made[f"{at}mlp.{name}_proj.weight"] = made[f"{at}mlp.{name}_proj.weight"][units]
        made[f"{at}mlp.down_proj.weight"] = made[f"{at}mlp.down_proj.weight"][:, units]
        order = random.permutation(groups)
        n = heads // groups
        inner = np.concatenate([group * n + random.permutation(n) for group in order])
        kv, q = (np.add.outer(o * WIDTH, np.arange(WIDTH)).reshape(-1) for o in (order, inner))
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            for kind in ("weight", "bias"):
                key = f"{at}self_attn.{name}_proj.{kind}"
                if key in made:
                    made[key] = made[key][rows]
        made[f"{at}self_attn.o_proj.weight"] = made[f"{at}self_attn.o_proj.weight"][:, q]
    return made


def config(heads: int = 4, groups: int = 2) -> dict[str, Any]:
    shape = {"intermediate_size": INNER, "num_attention_heads": heads, "num_key_value_heads": groups}
    return llama_config(LAYERS, HIDDEN, False, "float32") | shape | {"head_dim": WIDTH}


def save(path: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any], dtype: str = "float32") -> None:
    path.mkdir(parents=True)
    stored = {
        name: ((values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values, dtype)
        for name, values in ((name, np.ascontiguousarray(values)) for name, values in tensors.items())
    }
    write_safetensors(path / "model.safetensors", stored)
    write_json(path / "config.json", settings)


def plan_of(root: Path, text: str = RECIPE) -> Plan:
    return build_plan(parse_recipe(text.format(root=root)))


def raw(directory: Path) -> dict[str, bytes]:
    import torch

    with safe_open(directory / "model.safetensors", "pt") as file:
        return {
            name: file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes() for name in list(file.keys())
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_a_renumbered_copy_merges_back_to_the_model(tmp_path: Path, dtype: str, heads: int, groups: int) -> None:
    tensors = llama(1, heads, groups, bias=True)
    copy = renumbered(tensors, heads, groups)
    save(tmp_path / "a", tensors, config(heads, groups), dtype)
    save(tmp_path / "b", copy, config(heads, groups), dtype)
    assert raw(tmp_path / "a") != raw(tmp_path / "b")
    plan = plan_of(tmp_path)
    report = run_plan(plan, tmp_path / "out", threads=2)
    assert raw(tmp_path / "out") == raw(tmp_path / "a")
    assert verify_output(tmp_path / "out").problems == ()
    aligned = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["aligned"]
    assert aligned == list(report.aligned)
    assert {(entry["kind"], entry["units"]) for entry in aligned} == {("mlp", 48), ("attention", 2 * heads)}
    assert all(0 < entry["moved"] <= entry["units"] for entry in aligned)
    assert Plan.from_json(plan.to_json()) == plan


def test_renumbering_changes_nothing_that_the_model_computes(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = llama(1)
    logits = []
    for values in (tensors, renumbered(tensors)):
        model = LlamaForCausalLM(LlamaConfig(**config())).eval()
        model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in values.items()})
        with torch.no_grad():
            logits.append(model(torch.arange(12)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1])


def test_different_models_come_nearer_and_threads_and_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = llama(1), llama(2)
    save(tmp_path / "a", first, config())
    save(tmp_path / "b", second, config())
    text = """
merge_method: linear
base_model: {root}/a
models: [{{model: {root}/b}}, {{model: {root}/a, parameters: {{weight: 0}}}}]
parameters: {{weight: 1}}
align: permutation
"""
    run_plan(plan_of(tmp_path, text), tmp_path / "out", threads=1, block_chunks=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("mlp", "self_attn"):
        before, after = (
            sum(float(((first[name] - other[name]) ** 2).sum()) for name in first if part in name)
            for other in (second, found)
        )
        assert after < before
    assert all(np.array_equal(np.sort(found[name], None), np.sort(second[name], None)) for name in second)
    monkeypatch.setattr(merge.jobs.alignment.find, "ALIGN_BLOCK", 40)
    monkeypatch.setattr(merge.jobs.alignment.find, "ALIGN_UNITS", 5)
    run_plan(plan_of(tmp_path, text), tmp_path / "again", threads=3, block_chunks=7)
    assert all(
        (tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "again").iterdir()
    )


def test_resume_does_not_match_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = llama(1)
    save(tmp_path / "a", tensors, config())
    save(tmp_path / "b", renumbered(tensors), config())
    match = merge.jobs.alignment.find.match
    calls: list[str] = []

    def failing(reader: Any, units: Any) -> Any:
        if len(calls) == 3:
            calls.append("failed")
            raise OSError(5, "Input/output error")
        calls.append(units.module)
        return match(reader, units)

    monkeypatch.setattr(merge.jobs.alignment.find, "match", failing)
    plan = plan_of(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        run_plan(plan, tmp_path / "out")
    run_plan(plan, tmp_path / "out")
    assert len(calls) == 5  # three, the failure, and the one that was left
    assert raw(tmp_path / "out") == raw(tmp_path / "a")


@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("names", [("c_fc", "c_proj"), ("fc1", "fc2")])
def test_mlps_with_biases_and_transposed_weights(tmp_path: Path, names: tuple[str, str], conv1d: bool) -> None:
    random = np.random.default_rng(0)
    conv1d = conv1d and names[0] == "c_fc"
    first, last = (random.standard_normal(shape, np.float32) for shape in ((INNER, HIDDEN), (HIDDEN, INNER)))
    bias = random.standard_normal(INNER, np.float32)
    order = random.permutation(INNER)
    for name, units in (("a", np.arange(INNER)), ("b", order)):
        weights = [first[units], last[:, units]]
        tensors = {f"h.0.mlp.{n}.weight": w.T if conv1d else w for n, w in zip(names, weights, strict=True)}
        tensors |= {f"h.0.mlp.{names[0]}.bias": bias[units], f"h.0.mlp.{names[1]}.bias": bias[:HIDDEN]}
        tensors |= {"h.0.attn.c_attn.weight": first, "h.0.attn.c_proj.weight": last}
        save(tmp_path / name, tensors, {"model_type": "gpt2", "n_layer": 1})
    plan = plan_of(tmp_path)
    assert any(f"mlp ({names[0]}, {names[1]})" in note for note in plan.notes)
    assert any("no known symmetry" in note and "h.*.attn.c_attn.weight (1)" in note for note in plan.notes)
    run_plan(plan, tmp_path / "out")
    assert raw(tmp_path / "out") == raw(tmp_path / "a")


def test_slices_align_each_layer_to_the_one_it_is_laid_on(tmp_path: Path) -> None:
    tensors = llama(1)
    save(tmp_path / "a", tensors, config())
    save(tmp_path / "b", renumbered(tensors), config())
    text = """
merge_method: linear
slices:
  - sources: [{{model: {root}/a, layer_range: [0, 2]}}, {{model: {root}/b, layer_range: [0, 2]}}]
  - sources: [{{model: {root}/a, layer_range: [1, 2]}}, {{model: {root}/b, layer_range: [1, 2]}}]
parameters: {{weight: 1}}
align: permutation
"""
    run_plan(plan_of(tmp_path, text), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in (("mlp.down_proj", 1), ("self_attn.q_proj", 1), ("mlp.up_proj", 2)):
        assert np.array_equal(found[f"model.layers.{layer}.{name}.weight"], tensors[f"model.layers.1.{name}.weight"])


def test_unknown_tensors_beside_units_keep_the_layer_as_it_is(tmp_path: Path) -> None:
    tensors = llama(1) | {"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}
    for name in "ab":
        save(tmp_path / name, tensors, config())
    plan = plan_of(tmp_path)
    assert any("sinks may belong to its heads" in note for note in plan.notes)
    assert (
        sum(units.kind == "attention" for units in plan.findings if isinstance(units, PermutableModule)) == LAYERS - 1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("permutation", "permutations"), 'unknown way to align "permutations"; did you mean'),
        (RECIPE.replace("permutation", "[permutation]"), "align"),
        (RECIPE.replace(", {{model: {root}/b}}", ""), "nothing to align"),
    ],
)
def test_recipe_errors(tmp_path: Path, make_model: Callable[..., Path], text: str, message: str) -> None:
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
    with pytest.raises(RecipeError, match=message):
        plan_of(tmp_path, text)


def test_nothing_known_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name, {"net.0.kernel": np.ones((4, 4), np.float32)}, {"model_type": "own"})
    with pytest.raises(RecipeError, match="found no layer whose units can be permuted"):
        plan_of(tmp_path)
    heads = {f"layers.0.{n}_proj.weight": np.ones((4, 4), np.float32) for n in "qkvo"}
    for name in "cd":
        save(tmp_path / name, heads, {"model_type": "own", "num_attention_heads": 3})
    with pytest.raises(RecipeError, match="3 heads by its config do not fit"):
        plan_of(tmp_path, RECIPE.replace("/a", "/c").replace("/b", "/d"))


@pytest.mark.parametrize("shape", [(7, 5), (7,), (1, 6)])
@pytest.mark.parametrize("axis", [0, 1])
def test_any_part_of_a_permuted_tensor_is_read(shape: tuple[int, ...], axis: int) -> None:
    if axis >= len(shape):
        return
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    index = np.random.default_rng(0).permutation(shape[axis]).astype(np.int64)
    expected = np.take(values, index, axis).reshape(-1)

    def read(start: int, out: Any) -> None:
        out[:] = values.reshape(-1)[start : start + len(out)]

    for start in range(values.size):
        for stop in range(start, values.size + 1):
            out = np.empty(stop - start, np.float32)
            read_ordered(shape, axis, index, start, out, read)
            assert np.array_equal(out, expected[start:stop])
