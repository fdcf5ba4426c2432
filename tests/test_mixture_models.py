"""Mixtures of experts as transformers loads them: identical ones are the dense model, prompts give its states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_json
from mixture_models import SIZES, dense, mixture
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from merge import build_plan, parse_recipe, run_plan
from merge.jobs.mixtures.config import defaults, settled, window_of
from merge.moe_layouts import all_layouts

TOKENS = torch.arange(1, 25)[None]


def assert_same(model: Path, loaded: Any) -> None:
    """Logits to float32 rounding, and generates."""
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        expected, found = whole(TOKENS).logits, loaded(TOKENS).logits
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    told, expected = (each.generate(TOKENS[:, :3], max_new_tokens=2, do_sample=False) for each in (loaded, whole))
    assert torch.equal(told, expected)


@pytest.mark.parametrize(
    ("family", "config", "more", "kind"),
    [
        ("llama", {}, "", "MixtralForCausalLM"),
        ("llama", {"tie_word_embeddings": True}, "", "MixtralForCausalLM"),
        ("llama", {"head_dim": 16}, "", "MixtralForCausalLM"),
        ("mistral", {"sliding_window": 4}, "", "MixtralForCausalLM"),
        ("mistral", {"sliding_window": None}, "experts_per_token: 3\n", "MixtralForCausalLM"),
        ("qwen2", {}, "", "Qwen2MoeForCausalLM"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "",
            "Qwen2MoeForCausalLM",
        ),
        ("llama", {}, "architecture: qwen\n", "Qwen2MoeForCausalLM"),
        ("mistral", {"sliding_window": 4}, "architecture: qwen\n", "Qwen2MoeForCausalLM"),
        ("qwen3", {"head_dim": 16}, "", "Qwen3MoeForCausalLM"),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "architecture: qwen\n", "Qwen3MoeForCausalLM"),
        ("llama", {}, "architecture: deepseek\n", "DeepseekForCausalLM"),
        ("mistral", {"sliding_window": 4, "tie_word_embeddings": True}, "architecture: deepseek\n", None),
    ],
)
def test_identical_experts_are_the_dense_model(
    tmp_path: Path, family: str, config: dict[str, Any], more: str, kind: str | None
) -> None:
    model = dense(tmp_path / "dense", family, **config)
    loaded = mixture(tmp_path / "out", model, more)
    assert kind in (type(loaded).__name__, None)
    assert_same(model, loaded)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1000.0, "rope_type": "default"},
        {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    ],
)
def test_what_the_config_says_of_positions_is_kept(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = dense(tmp_path / "dense", "llama", rope_parameters=rope)
    assert_same(model, mixture(tmp_path / "out", model))


def test_a_config_in_the_old_spelling_with_much_left_to_defaults(tmp_path: Path) -> None:
    """Mixtral's defaults are others than Llama's: theta 1e6, norm epsilon 1e-5, eight KV heads."""
    model = dense(tmp_path / "dense", "llama", num_key_value_heads=4)
    config = json.loads((model / "config.json").read_text())
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim", "hidden_act"):
        del config[key]
    write_json(model / "config.json", config)
    assert_same(model, mixture(tmp_path / "out", model))
    write_json(model / "config.json", config | {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert_same(model, mixture(tmp_path / "out2", model))


def test_a_shared_expert_of_deepseek_is_added_to_the_routed_ones(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense", "llama")
    shared = f"shared_experts: [{{source_model: {model}, residual_scale: 0.25}}]\n"
    loaded = mixture(tmp_path / "out", model, shared, ", residual_scale: 0.75")
    assert type(loaded).__name__ == "DeepseekForCausalLM"
    assert_same(model, loaded)


def test_a_shared_expert_of_qwen_without_prompts_counts_half(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense", "qwen2")
    shared = f"shared_experts: [{{source_model: {model}}}]\n"
    assert_same(model, mixture(tmp_path / "out", model, shared, ", residual_scale: 0.5", mode="zero"))


def test_neurons_drawn_anew_with_ratio_0_change_nothing_and_with_1_everything(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense", "llama")
    assert_same(model, mixture(tmp_path / "same", model, "reinit: {ratio: 0}\n"))
    other = mixture(tmp_path / "other", model, "reinit: {ratio: 1}\n")
    with torch.no_grad():
        difference = other(TOKENS).logits - AutoModelForCausalLM.from_pretrained(model)(TOKENS).logits
    assert float(difference.abs().max()) > 0.1


PROMPTS = (["w1 w2 w3 w4", "w5", "w6 w7"], ["w8 w9 w10"]), (["w11 w12"], []), (["w13 w14 w15", "w16 w17 w18"], ["w19"])


@pytest.mark.parametrize(
    ("family", "config", "mode"),
    [
        ("llama", {}, "hidden_avg"),
        ("mistral", {"sliding_window": 2}, "hidden"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}, "hidden"),
        ("qwen3", {"head_dim": 16}, "hidden_avg"),
    ],
)
def test_hidden_is_what_a_whole_model_says(tmp_path: Path, family: str, config: dict[str, Any], mode: str) -> None:
    """Layer by layer as transformers has it with output_hidden_states, prompts one after another."""
    model = dense(tmp_path / "dense", family, **config)
    experts = "".join(
        f"  - {{source_model: {model}, positive_prompts: {positive}, negative_prompts: {negative}}}\n"
        for positive, negative in PROMPTS
    )
    recipe = f"base_model: {model}\ngate_mode: {mode}\nexperts:\n{experts}"
    run_plan(build_plan(parse_recipe(recipe)), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    whole = AutoModelForCausalLM.from_pretrained(model).eval()

    def states(prompts: list[str]) -> np.ndarray:
        """(layer, hidden)"""
        total = np.zeros((3, 32))
        for prompt in prompts:
            tokens = torch.tensor([[int(word[1:]) for word in prompt.split()]])
            with torch.no_grad():
                told = whole(tokens, output_hidden_states=True)
            layers = torch.stack(told.hidden_states[:-1])[:, 0].double().numpy()
            total += layers.mean(1) if mode == "hidden_avg" else layers[:, -1]
        return total / len(prompts)

    block = all_layouts()["mixtral"].block if family in ("llama", "mistral") else "mlp"
    for number, (positive, negative) in enumerate(PROMPTS):
        row = states(positive) - (states(negative) if negative else 0)
        row /= np.linalg.norm(row, axis=1, keepdims=True)
        for layer in range(3):
            gate = found[f"model.layers.{layer}.{block}.gate.weight"]
            np.testing.assert_allclose(gate[number], row[layer], rtol=1e-3, atol=2e-6)


def test_a_shared_gate_of_qwen_is_made_of_its_prompts(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense", "qwen2")
    text = f"""
base_model: {model}
gate_mode: cheap_embed
experts:
  - {{source_model: {model}, positive_prompts: [w1]}}
  - {{source_model: {model}, positive_prompts: [w2]}}
shared_experts:
  - {{source_model: {model}, positive_prompts: [w3 w4]}}
"""
    run_plan(build_plan(parse_recipe(text)), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    summed = embedding[3] + embedding[4]
    gate = found["model.layers.2.mlp.shared_expert_gate.weight"]
    np.testing.assert_allclose(gate, summed[None] / np.linalg.norm(summed), rtol=1e-5, atol=1e-7)
    assert found["model.layers.2.mlp.gate.weight"].shape == (2, 32)


@pytest.mark.parametrize("family", defaults())
def test_what_configs_leave_out_is_what_transformers_takes(family: str) -> None:
    known = AutoConfig.for_model(family).to_dict()
    sizes = {key: known[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    full = settled({"model_type": family, **sizes})
    expected = {key: known[key] for key in full if key in known}
    assert {key: full[key] for key in expected} == expected
    assert set(full) - set(expected) <= {"rope_theta", "model_type", "head_dim"}
    assert full["rope_theta"] == known["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"sliding_window": 4}),
    ],
)
def test_windows_are_where_transformers_has_them(family: str, config: dict[str, Any]) -> None:
    known = AutoConfig.for_model(family, num_hidden_layers=3, **config)
    window = window_of(settled({"model_type": family, **SIZES, **config}))
    size = getattr(known, "sliding_window", None)
    types = getattr(known, "layer_types", None) or ["sliding_attention" if size else "full_attention"] * 3
    assert window.layers == tuple(kind == "sliding_attention" for kind in types)
    assert not any(window.layers) or window.size == size


def test_mixed_windows_do_not_fit_layouts_with_one_kind_of_layer(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    model = dense(tmp_path / "q", "qwen3", head_dim=16, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(Exception, match="Qwen3-MoE has one kind of layer"):
        mixture(tmp_path / "out", model)
