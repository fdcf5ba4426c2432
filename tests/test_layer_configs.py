"""Configs of rearranged layers, held against what transformers itself makes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from merge.errors import CheckpointError, RecipeError
from merge.output.config import output_config
from merge.output.layers import Restacked, restack

UPSCALED = (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)
N = 8
Config = dict[str, Any]


def restacked(
    config: Config, order: tuple[int, ...] = UPSCALED, *others: Config, module: str = "default"
) -> tuple[Config, str]:
    """The config of `config`'s layers in this order, or of those of `others` in turns; the notes."""
    sources = others or (config,)
    origins = [("DIR", copy.deepcopy(sources[i % len(sources)]), layer) for i, layer in enumerate(order)]
    made = copy.deepcopy(config)
    notes = restack(made, Restacked(module, N, origins))
    return made, "\n".join(notes)


def as_transformers(config: Config) -> Any:
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **copy.deepcopy(values))


# What a config says -> (the attribute that transformers derives, whether a note is due).
DERIVED: list[tuple[Config, str, bool]] = [
    ({"model_type": "gemma2"}, "layer_types", False),  # UPSCALED keeps pairs
    ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, "layer_types", True),
    ({"model_type": "gemma3_text"}, "layer_types", True),
    ({"model_type": "cohere2", "sliding_window_pattern": 4}, "layer_types", False),
    ({"model_type": "cohere2"}, "layer_types", False),
    ({"model_type": "olmo3"}, "layer_types", False),
    ({"model_type": "gpt_oss"}, "layer_types", False),
    ({"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 3}, "layer_types", True),
    ({"model_type": "afmoe", "global_attn_every_n_layers": 3}, "layer_types", True),
    ({"model_type": "modernbert", "global_attn_every_n_layers": 3}, "layer_types", True),
    ({"model_type": "qwen3_next", "full_attention_interval": 3}, "layer_types", True),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 6},
        "layer_types",
        True,
    ),
    (
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 8},
        "layer_types",
        True,
    ),
    ({"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 6}, "layer_types", False),
    (
        {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5},
        "layer_types",
        True,
    ),
    ({"model_type": "smollm3", "no_rope_layer_interval": 3}, "no_rope_layers", True),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0]}, "no_rope_layers", False),
    ({"model_type": "llama4_text", "interleave_moe_layer_step": 3}, "moe_layers", True),
    ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, "moe_layers", False),
    ({"model_type": "llama4_text", "moe_layers": [1, 6]}, "moe_layers", False),
    (
        {"model_type": "gpt_neo", "attention_types": [[["global", "local", "local"], 2], [["global"], 2]]},
        "attention_layers",
        True,
    ),
    ({"model_type": "lfm2", "full_attn_idxs": [2, 5]}, "layer_types", False),
    ({"model_type": "bamba", "attn_layer_indices": [1, 6]}, "layers_block_type", False),
    ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1}, "layers_block_type", False),
    ({"model_type": "axk1", "first_k_dense_replace": 3}, "mlp_layer_types", True),
    (
        {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 5},
        "layer_types",
        False,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "attribute", "noted"), DERIVED)
def test_every_layer_keeps_its_kind(config: Config, attribute: str, noted: bool) -> None:
    count = "num_layers" if config["model_type"] == "gpt_neo" else "num_hidden_layers"
    config = {**config, count: N}
    before = kinds(config, attribute)
    assert len(before) == N
    made, notes = restacked(config)
    assert made[count] == len(UPSCALED)
    assert kinds(made, attribute) == [before[layer] for layer in UPSCALED]
    assert bool(notes) == noted, notes
    same, notes = restacked(config, tuple(range(N)))
    assert (kinds(same, attribute), notes) == (before, "")


def kinds(config: Config, attribute: str) -> list[Any]:
    made = as_transformers(config)
    found = list(getattr(made, attribute))
    n = config.get("num_hidden_layers", len(found))
    return [layer in found for layer in range(n)] if attribute == "moe_layers" else found


def is_dense(config: Config) -> list[bool]:
    """As Qwen's decoder layers decide it."""
    made = as_transformers(config)
    return [
        layer in made.mlp_only_layers or (layer + 1) % made.decoder_sparse_step != 0
        for layer in range(config["num_hidden_layers"])
    ]


@pytest.mark.parametrize(
    "own", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1, 6]}, {"decoder_sparse_step": 3, "mlp_only_layers": [2]}]
)
def test_dense_layers_of_qwen_moe(own: Config) -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": N, "num_experts": 4} | own
    made, _ = restacked(config)
    before = is_dense(config)
    assert is_dense(made) == [before[layer] for layer in UPSCALED]


def test_dense_layers_of_deepseek_come_first_or_not_at_all() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": N, "first_k_dense_replace": 3, "moe_layer_freq": 1}
    made, note = restacked(config, (0, 1, 3, 4, 5, 6))
    assert (made["first_k_dense_replace"], made["num_hidden_layers"]) == (2, 6)
    assert note == (
        "config.json: dense layers: first_k_dense_replace 3, moe_layer_freq 1 does not fit the layers in this order; "
        "now 2 x dense, 4 x sparse"
    )
    with pytest.raises(RecipeError) as raised:
        restacked(config)
    assert str(raised.value) == (
        "config.json: dense layers: first_k_dense_replace 3, moe_layer_freq 1 cannot describe the layers in "
        "this order, which are 3 x dense, 3 x sparse, 1 x dense, 5 x sparse. Choose ranges that keep the pattern."
    )


@pytest.mark.parametrize(
    ("own", "order", "expected"),
    [
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1}, (0, 1, 1, 2), None),
        ({"model_type": "jamba", "expert_layer_period": 2, "expert_layer_offset": 1}, (0, 1, 3, 4), None),
        (
            {"model_type": "ernie4_5_moe", "moe_layer_start_index": 2, "moe_layer_end_index": -1},
            (0, 2, 3),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        ),
        ({"model_type": "ernie4_5_moe", "moe_layer_start_index": 2, "moe_layer_end_index": 7}, (2, 0, 3), None),
        (
            {"model_type": "gemma3n_text", "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * N},
            (0, 5, 6, 7, 7),
            {"num_kv_shared_layers": 3},
        ),
        (
            {"model_type": "gemma3n_text", "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * N},
            (0, 6, 1, 7),
            None,
        ),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-M*-ME"},
            (0, 1, 7, 7),
            {"hybrid_override_pattern": "M*EE"},
        ),
        ({"model_type": "openelm", "num_kv_heads": list(range(N))}, (3, 2, 7), {"num_kv_heads": [3, 2, 7]}),
        (
            {"model_type": "mllama_text_model", "cross_attention_layers": [3, 7]},
            (3, 0, 7, 3),
            {"cross_attention_layers": [0, 2, 3]},
        ),
        (
            {"model_type": "x", "eos_token_id": list(range(N)), "architectures": ["A"] * N},
            (0, 1),
            {"eos_token_id": list(range(N))},
        ),
    ],
)
def test_what_can_be_said_and_what_cannot(own: Config, order: tuple[int, ...], expected: Config | None) -> None:
    config = {"num_hidden_layers": N} | own
    if expected is None:
        with pytest.raises(RecipeError, match="cannot describe the layers in this order"):
            restacked(config, order)
        return
    made, _ = restacked(config, order)
    lists = {"layer_types": made["layer_types"]} if "layer_types" in config else {}
    assert made == config | expected | lists | {"num_hidden_layers": len(order)}


def test_each_source_says_it_of_its_own_layers() -> None:
    window = {"model_type": "qwen2", "num_hidden_layers": N, "use_sliding_window": True, "sliding_window": 8}
    first, second = window | {"max_window_layers": 6}, window | {"layer_types": ["sliding_attention"] * N}
    plain = {"model_type": "qwen2", "num_hidden_layers": N}
    made, _ = restacked(first, (0, 1, 2, 6), first, second, plain, first)
    full, sliding = "full_attention", "sliding_attention"
    assert made["layer_types"] == [full, sliding, full, sliding]
    with pytest.raises(CheckpointError, match="layer_types: expected a list with one value for each layer, up"):
        restacked(first, (0, 7), first, window | {"layer_types": [full] * 3})


@pytest.mark.parametrize("kind", [["qwen2"], 7])
def test_a_rule_of_no_known_form_names_its_config(kind: Any) -> None:
    broken = {"model_type": kind, "num_hidden_layers": N, "sliding_window": 8}
    with pytest.raises(CheckpointError, match="layer_types: cannot be read as a rule for layers"):
        restacked(broken, (0, 1), broken, broken)


def test_the_vision_tower_has_a_section_of_its_own() -> None:
    config: Config = {
        "text_config": {"num_hidden_layers": 4},
        "vision_config": {"depth": N, "fullatt_block_indexes": [3, 7]},
    }
    made, _ = restacked(config, (0, 3, 7, 7), module="vision_tower")
    assert made["vision_config"] == {"depth": 4, "fullatt_block_indexes": [1, 2, 3]}
    assert made["text_config"] == config["text_config"]


def test_what_is_repeated_outside_the_section_follows() -> None:
    text = {"num_hidden_layers": N, "layer_types": ["full_attention"] * N, "hidden_size": 4}
    made, _ = restacked({**text, "hidden_size": 8, "text_config": text, "vocab_size": 3}, (0, 1))
    expected = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert made == {**expected, "hidden_size": 8, "text_config": {**text, **expected}, "vocab_size": 3}


def test_the_rest_of_the_config_stays() -> None:
    config = {"model_type": "qwen2", "num_hidden_layers": N, "rope_scaling": {"factor": 8}, "vocab_size": 5}
    stack = Restacked("default", N, [("DIR", config, layer) for layer in (0, 1)])
    text, _, notes = output_config(config, dtype="float16", tie_flags={}, vocabulary=6, stacks=[stack])
    assert '"num_hidden_layers": 2' in text
    assert '"vocab_size": 6' in text
    assert (config["num_hidden_layers"], notes) == (N, ())
