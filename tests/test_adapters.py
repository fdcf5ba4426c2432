"""Adapters: folded while they are read, as PEFT folds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import fold, make_adapter, make_base, plan_of, read, steps_apart
from safetensors.numpy import load_file, save_file

from merge import build_plan, parse_recipe, run_plan
from merge.checkpoint.reader import SourceReader
from merge.plan import Derived, Plan

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and peft warn of is not ours


def ulps(left: np.ndarray, right: np.ndarray) -> int:
    """The largest distance in steps of bfloat16 between numbers that are bfloat16."""
    steps = [np.asarray(each, np.float32).view(np.int32).astype(np.int64) >> 16 for each in (left, right)]
    ordered = [np.where(bits < 0, -(bits & 0x7FFF), bits) for bits in steps]
    return int(np.abs(ordered[0] - ordered[1]).max())


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "dora of an embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 16, "down_proj": 3},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 9}},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 0, 39]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_folded_adapter_is_what_peft_makes_of_it(tmp_path: Path, kind: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    expected = make_adapter(tmp_path / "adapter", base, **SETTINGS[kind])
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    is_tied = expected.pop("tied")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == is_tied
    if is_tied:
        assert np.array_equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    before = read(base)
    assert any(not np.array_equal(found[name], before[name]) for name in before)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "modules_to_save"])
def test_in_bfloat16_it_is_within_one_step_of_pefts(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=True)
    expected = make_adapter(tmp_path / "adapter", base, "bfloat16", **SETTINGS[kind])
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    before = read(base)
    for name in found:
        if kind == "embedding" and "embed" in name:  # PEFT rounds an embedding's change before it adds it
            step = 2.0**-7 * (np.abs(before[name]) + np.abs(found[name]))
            assert (np.abs(found[name] - expected[name]) <= step).all(), name
            weights = read(tmp_path / "adapter")
            a, b = (weights[f"base_model.model.model.embed_tokens.lora_embedding_{part}"] for part in "AB")
            exact = before[name] + 1.5 * (b.astype(np.float64) @ a).T
            assert ulps(found[name], as_bfloat16(exact)) <= 1
        else:
            old = before.get(name, before["model.embed_tokens.weight"])  # of a head that was tied
            assert steps_apart(found[name], expected[name], old) <= 1, name


@pytest.mark.parametrize("dora", [False, True])
def test_matrices_stored_by_input_are_folded_turned(tmp_path: Path, dora: bool) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    expected = make_adapter(
        tmp_path / "adapter", base, target_modules=["c_attn", "c_proj", "c_fc", "wte"], use_dora=dora
    )
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)


def test_names_may_differ_by_a_prefix(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    expected = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    weights = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): values for name, values in weights.items()}, base / "model.safetensors"
    )
    found = fold(base, tmp_path / "adapter", tmp_path / "out")
    np.testing.assert_allclose(
        found["h.1.attn.c_attn.weight"], expected["transformer.h.1.attn.c_attn.weight"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "dora of an embedding"])
def test_bytes_depend_neither_on_threads_nor_on_blocks(tmp_path: Path, kind: str) -> None:
    # More rows and columns than a chunk and a kernel's tile have.
    base = make_base(tmp_path / "base", hidden_size=1200, intermediate_size=640, num_hidden_layers=1, vocab_size=700)
    make_adapter(tmp_path / "adapter", base, **{"r": 5} | SETTINGS[kind])
    outs = []
    for threads, chunks in ((1, 1), (2, 3)):
        outs.append(tmp_path / f"out{threads}")
        fold(base, tmp_path / "adapter", outs[-1], threads=threads, block_chunks=chunks)
    files = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert files[0] == files[1]


def test_a_recipe_of_adapters_is_the_recipe_of_folded_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    models: dict[str, list[str]] = {"refs": [], "folded": []}
    for seed, kind in enumerate(("lora", "dora", "rslora")):
        adapter = tmp_path / kind
        make_adapter(adapter, base, seed=seed, target_modules=["q_proj", "down_proj"], **SETTINGS[kind])
        fold(base, adapter, tmp_path / f"folded-{kind}")
        models["refs"].append(f"{base}+{adapter}")
        models["folded"].append(f"{tmp_path}/folded-{kind}")
    for name, refs in models.items():
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": ref, "parameters": {"weight": 0.7, "density": 0.4}} for ref in refs],
        }
        plan = build_plan(parse_recipe(json.dumps(recipe)))
        assert Plan.from_json(plan.to_json()) == plan
        run_plan(plan, tmp_path / name)
    first, second = read(tmp_path / "refs"), read(tmp_path / "folded")
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    manifest = json.loads((tmp_path / "refs" / "merge_manifest.json").read_text())
    assert [model["model"] for model in manifest["models"][1:]] == models["refs"]
    assert all("adapter_model.safetensors" in model["files"] for model in manifest["models"][1:])


def test_the_same_base_with_two_adapters_is_two_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for seed in (1, 2):
        make_adapter(tmp_path / f"a{seed}", base, seed=seed, target_modules=["q_proj"])
    both = [f"{base}+{tmp_path}/a{seed}" for seed in (1, 2)]
    stack = [{"sources": [{"model": ref, "layer_range": [place, place + 1]}]} for place, ref in enumerate(both)]
    run_plan(build_plan(parse_recipe(json.dumps({"merge_method": "passthrough", "slices": stack}))), tmp_path / "out")
    found = read(tmp_path / "out")
    for place, seed in enumerate((1, 2)):
        name = f"model.layers.{place}.self_attn.q_proj.weight"
        assert np.array_equal(found[name], fold(base, tmp_path / f"a{seed}", tmp_path / f"out{seed}")[name])


def test_mergekits_mapping_and_its_override_are_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    model = {
        "model": {"path": str(base)},
        "lora": {"path": str(tmp_path / "adapter")},
        "override_architecture": "MistralForCausalLM",
    }
    plan = build_plan(parse_recipe(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]})))
    assert any("override_architecture has no effect" in note for note in plan.notes)
    assert sum(isinstance(ref, Derived) for step in plan.steps for ref in step.inputs) == 2


def test_a_torch_pickle_is_the_same_adapter(tmp_path: Path) -> None:
    import torch

    base = make_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    make_adapter(adapter, base, target_modules=["q_proj"])
    expected = fold(base, adapter, tmp_path / "expected")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    renamed = {name.replace(".weight", ".default.weight"): torch.from_numpy(values) for name, values in weights.items()}
    torch.save(renamed, adapter / "adapter_model.bin")
    found = fold(base, adapter, tmp_path / "out")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora of an embedding", "trained tokens"])
def test_any_range_of_a_folded_tensor_can_be_read(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **SETTINGS[kind])
    plan = plan_of(f"{base}+{tmp_path}/adapter")
    refs = [source for step in plan.steps for source in step.sources if isinstance(source, Derived)]
    assert refs
    with SourceReader(file for model in plan.models for file in model.files) as reader:
        for ref in refs:
            whole = np.empty(ref.size, np.float32)
            reader.read_values(ref, 0, whole)
            for start, stop in ((0, 1), (5, 70), (31, 33), (ref.size - 3, ref.size)):
                part = np.empty(stop - start, np.float32)
                reader.read_values(ref, start, part)
                assert np.array_equal(part, whole[start:stop]), (ref.name, start)
