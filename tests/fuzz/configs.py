"""config.json, generation_config.json and the other files beside the weights."""

from __future__ import annotations

import json
import random
from typing import Any

from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import LINEAR, Place, a_run

RECIPES = (
    LINEAR,
    "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
    "- sources: [{model: b, layer_range: [0, 2]}]\n",
    "merge_method: passthrough\nmodels: [{model: b}]\nupscale: {overlap: 1}\n",
    "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\nalign: permutation\n",
)
# Keys that some part of the tool looks at.
KEYS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "tie_word_embeddings", "torch_dtype", "dtype", "model_type", "architectures", "text_config"),
    *("vision_config", "layer_types", "quantization_config", "compression_config", "eos_token_id", "pad_token_id"),
    *("sliding_window", "max_position_embeddings", "num_experts", "num_local_experts", "encoder_layers", "depth"),
    *("rope_parameters", "auto_map", "n_layer", "llm_config", "max_window_layers", "is_encoder_decoder"),
)
QUANTIZATIONS = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "fp8", "weight_block_size": [0, 2**62]},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8}}}},
    {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"},
    {"quant_method": "awq", "bits": 4, "version": "gemm"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "mxfp4"},
    {"quant_method": ["fp8"]},
)


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(config={"layer_types": ["full_attention"] * 2, "text_config": None, "eos_token_id": 2})
        self._config = json.loads((place.path / "b/config.json").read_text())
        self._generation = {"eos_token_id": [1, 2], "max_length": 20, "transformers_version": "5.0.0"}
        for model in "ab":
            (place.path / model / "generation_config.json").write_text(json.dumps(self._generation))
        return place.recipe(LINEAR)

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        place.put("r.yaml", dice.choice(RECIPES))
        config: Any = json.loads(json.dumps(self._config))
        match dice.randrange(4):
            case 0:
                place.put("b/config.json", damage.json_text(config, dice))
            case 1:
                for key in damage.some_of(KEYS, dice):
                    config[key] = damage.value(dice)
            case 2:
                config["quantization_config"] = damage.in_tree(dice.choice(QUANTIZATIONS), dice)
            case _:
                inner = {key: config[key] for key in damage.some_of(list(config), dice)}
                config[dice.choice(("text_config", "vision_config", "llm_config"))] = damage.in_tree(inner, dice)
        if not damage.chance(dice, 0.25):
            place.put("b/config.json", json.dumps(config).encode("utf-8", "surrogatepass"))
        if damage.chance(dice, 0.2):
            place.put("a/generation_config.json", damage.json_text(self._generation, dice))
        return dice.choice((["memory", "b"], ["memory", "b", "--json"])) if damage.chance(dice, 0.1) else a_run(dice)
