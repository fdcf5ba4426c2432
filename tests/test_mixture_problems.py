"""Mixtures that cannot be made: recipes, sizes, families, configs and dtypes that do not fit, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtures
import numpy as np
import pytest
from mixtures import TWO, made, planned
from safetensors.numpy import load_file, save_file

from merge import build_plan, parse_recipe
from merge.errors import CheckpointError, RecipeError
from merge.moe_layouts import all_layouts

root = mixtures.root  # fixture

BASE = "base_model: {root}/a\ngate_mode: zero\n"
ONE = "experts: [{{source_model: {root}/a}}, {{source_model: {root}/b}}]\n"
BAD = {
    "no_experts": (BASE + "experts: []\n", ':3: a mixture needs "experts", a list of'),
    "no_base": (ONE, ':1: a mixture needs "base_model"'),
    "typo": (
        BASE + ONE + "expert_per_token: 2\n",
        ':4: unknown key "expert_per_token"; did you mean "experts_per_token"',
    ),
    "typo_in_expert": (
        BASE + "experts: [{{source_model: {root}/a, positive_promts: [x]}}, {{source_model: {root}/b}}]\n",
        ':3: unknown key "positive_promts"; did you mean "positive_prompts"?',
    ),
    "gate_mode": (
        ONE + "base_model: {root}/a\ngate_mode: hiden\n",
        ':3: unknown gate_mode "hiden"; did you mean "hidden"',
    ),
    "architecture": (
        BASE + ONE + "architecture: mixtrall\n",
        ':4: unknown architecture "mixtrall"; did you mean "mixtral"',
    ),
    "too_many_per_token": (
        BASE + ONE + "experts_per_token: 3\n",
        ':4: "experts_per_token" is 3, and only 2 experts are',
    ),
    "too_few_experts": (
        BASE + "experts: [{{source_model: {root}/a}}]\n",
        '"experts_per_token" is 2 by default, and only 1',
    ),
    "zero_per_token": (
        BASE + ONE + "experts_per_token: 0\n",
        '"experts_per_token" must be a whole number of at least 1',
    ),
    "no_prompts": (ONE + "base_model: {root}/a\n", ':1: gate_mode "hidden" needs "positive_prompts" for each expert'),
    "prompts_are_a_text": (
        BASE + "experts: [{{source_model: {root}/a, positive_prompts: hi}}, {{source_model: {root}/b}}]\n",
        ':3: "positive_prompts" must be a list, not "hi"',
    ),
    "prompt_is_a_number": (
        BASE + "experts: [{{source_model: {root}/a, positive_prompts: [4]}}, {{source_model: {root}/b}}]\n",
        ':3: an entry of "positive_prompts" must be a string, not 4; quote it: "4"',
    ),
    "same_prompts": (
        "base_model: {root}/a\nexperts:\n"
        "- {{source_model: {root}/a, positive_prompts: [x]}}\n- {{source_model: {root}/b, positive_prompts: [x]}}\n",
        ":2: all experts have the same prompts",
    ),
    "cancelled_prompts": (
        "base_model: {root}/a\nexperts:\n- {{source_model: {root}/a, positive_prompts: [x], negative_prompts: [x]}}\n"
        "- {{source_model: {root}/b, positive_prompts: [y]}}\n",
        ":3: its positive and negative prompts are the same",
    ),
    "negative_noise": (
        BASE + "experts: [{{source_model: {root}/a, noise_scale: -1}}, {{source_model: {root}/b}}]\n",
        ':3: "noise_scale" must be a number of at least 0, not -1',
    ),
    "ratio": (BASE + ONE + "reinit: {{ratio: 1.5}}\n", ':4: "ratio" must be a number from 0 to 1, not 1.5'),
    "no_ratio": (BASE + ONE + "reinit: {{}}\n", ':4: "reinit" needs the key "ratio"'),
    "attention_word": (BASE + ONE + "attention: mean\n", ':4: unknown attention "mean"; known: base, average'),
    "attention_method": (
        BASE + ONE + "attention: {{merge_method: tise}}\n",
        ':4: unknown method "tise"; did you mean "ties"',
    ),
    "attention_parameter": (
        BASE + ONE + "attention: {{merge_method: ties, parameters: {{desnity: 1}}}}\n",
        ':4: unknown key "desnity"; did you mean "density"?',
    ),
    "attention_needs": (
        BASE + ONE + "attention: {{merge_method: slerp}}\n",
        ':4: slerp needs the parameter "t": write it under "parameters" of "attention"',
    ),
    "attention_statistics": (
        BASE + ONE + "attention: {{merge_method: fisher}}\n",
        ':4: fisher needs statistics of each model, which "attention" cannot name',
    ),
    "attention_passthrough": (
        BASE + ONE + "attention: {{merge_method: passthrough}}\n",
        ":4: passthrough merges nothing",
    ),
    "attention_count": (
        BASE + ONE + "attention: {{merge_method: model_stock}}\n",
        ":4: model_stock merges at least 2 models besides the base, and the recipe lists 1 as experts",
    ),
    "shared_in_mixtral": (
        BASE + ONE + "architecture: mixtral\nshared_experts: [{{source_model: {root}/a}}]\n",
        ":5: Mixtral has no shared expert, and the recipe lists 1.",
    ),
    "two_shared": (
        BASE + ONE + "shared_experts: [{{source_model: {root}/a}}, {{source_model: {root}/b}}]\n",
        ":4: DeepSeek-MoE has at most one shared expert, and the recipe lists 2.",
    ),
    "deepseek_prompts": (
        BASE + ONE + "architecture: deepseek\nshared_experts: [{{source_model: {root}/a, positive_prompts: [x]}}]\n",
        ":5: the shared expert of DeepSeek-MoE has no gate, so its prompts would have no effect.",
    ),
    "qwen3_of_llama": (BASE + ONE + "architecture: qwen3\n", ":4: Qwen3-MoE has experts of qwen3, and"),
    "merge_method": (BASE + ONE + "merge_method: ties\n", ':4: unknown key "merge_method"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(root: Path, name: str) -> None:
    text, expected = BAD[name]
    with pytest.raises(RecipeError) as caught:
        build_plan(parse_recipe(text.format(root=root), str(root / "r.yaml")))
    told = [str(problem) for problem in caught.value.problems]
    assert any(line.startswith(f"{root}/r.yaml:") and expected in line for line in told), told


def change(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def refused(root: Path, text: str = TWO) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(root, text)
    return str(caught.value)


def test_experts_of_other_sizes_are_refused_by_name(root: Path, make_model: Callable[..., Path]) -> None:
    make_model(root / "b", hidden=32)
    assert f"{root}/b: model.layers.0.mlp.gate_proj.weight is [64, 32], and [32, 16] is needed" in refused(root)
    make_model(root / "b", layers=3)
    assert f"{root}/b has 3 layers, and the base {root}/a has 2." in refused(root)
    make_model(root / "b", layers=1)
    assert f"{root}/b has no model.layers.1.mlp.gate_proj.weight and 2 more." in refused(root)


def test_what_the_layout_has_no_place_for_is_refused(root: Path, make_model: Callable[..., Path]) -> None:
    bias = {"model.layers.1.self_attn.q_proj.bias": np.zeros(16, np.float32)}
    make_model(root / "a", seed=1, extra=bias)
    assert "model.layers.1.self_attn.q_proj.bias: Mixtral has no place for this tensor." in refused(root)
    make_model(root / "a", seed=1)
    make_model(root / "b", extra={"model.layers.0.mlp.up_proj.bias": np.zeros(32, np.float32)})
    assert f"{root}/b: experts of Mixtral have no biases, and there is model.layers.0.mlp.up_proj.bias." in refused(
        root
    )
    make_model(root / "b", extra={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    planned(root, TWO)
    make_model(root / "a", seed=1, extra={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    assert any("1 rotary_emb.inv_freq tensors are not written" in note for note in planned(root, TWO).notes)


def test_a_family_that_cannot_become_experts_is_told_which_can(root: Path) -> None:
    change(root / "a", model_type="gemma2")
    told = refused(root)
    assert 'no mixture of experts is known for the architecture "gemma2"' in told
    families = told.rstrip(".").rpartition("can become experts: ")[2].split(", ")
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(families)
    assert set(families) == {family for layout in all_layouts().values() for family in layout.families}
    change(root / "a", model_type="llama")
    change(root / "b", model_type="phi3")
    assert f'Mixtral has experts of llama or mistral, and {root}/b is "phi3".' in refused(root)


def test_configs_that_do_not_fit_are_refused(root: Path) -> None:
    change(root / "b", hidden_act="gelu")
    assert f"{root}/b has hidden_act gelu, and experts of Mixtral are gated by silu." in refused(root)
    change(root / "b", hidden_act="silu")
    change(root / "a", head_dim=16)
    assert "Qwen2-MoE has heads of hidden_size / num_attention_heads = 8" in refused(root, TWO + "architecture: qwen\n")


def test_a_config_without_sizes_is_refused(root: Path) -> None:
    for key, value in (("hidden_size", None), ("num_attention_heads", 0), ("num_key_value_heads", "two")):
        before = (root / "a" / "config.json").read_text()
        change(root / "a", **{key: value})
        assert f"{root}/a/config.json: {key}: expected a whole number, found {value!r}." in refused(root)
        (root / "a" / "config.json").write_text(before)
    change(root / "a", hidden_size=8, num_attention_heads=1)
    assert "has it as [32, 16], and its config a hidden_size of 8." in refused(root)


def test_what_the_base_lacks_is_named(root: Path) -> None:
    change(root / "a", num_hidden_layers=3)
    assert f"{root}/a has no layers named model.layers.0, model.layers.1 ... that its config confirms." in refused(root)
    change(root / "a", num_hidden_layers=2)
    tensors = load_file(root / "a" / "model.safetensors")
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.norm.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, root / "a" / "model.safetensors")
        assert f"{name}: missing from {root}/a; Mixtral needs it." in refused(root)
    save_file(tensors, root / "a" / "model.safetensors")
    planned(root, TWO + "architecture: qwen\n")  # Llama has no biases
    for model in "ab":
        change(root / model, model_type="qwen2")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert f"{name}: missing from {root}/a and 5 more; Qwen2-MoE needs it." in refused(root)


def test_a_config_that_is_not_of_the_weights_is_told_when_prompts_are_run(root: Path) -> None:
    change(root / "a", intermediate_size=48)
    with pytest.raises(
        CheckpointError, match=r"layer 0 does not fit the model that transformers builds from config\.json"
    ):
        made(root, TWO, "hidden")
    made(root, TWO, "cheap_embed", out="cheap")
    assert json.loads((root / "cheap" / "config.json").read_text())["intermediate_size"] == 32  # of the experts


def test_a_quantized_expert_is_refused(root: Path, make_model: Callable[..., Path]) -> None:
    make_model(root / "b", extra={"model.layers.1.mlp.up_proj.weight": np.zeros((32, 16), np.int8)})
    assert f"{root}/b: model.layers.1.mlp.up_proj.weight holds whole numbers" in refused(root)


def test_a_tokenizer_of_another_model_is_refused(root: Path) -> None:
    tokenizer = json.loads((root / "a" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w3"] = 99
    (root / "a" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RecipeError, match="tokenizer has token 99, its embedding 32 rows"):
        planned(root, TWO, "hidden")
