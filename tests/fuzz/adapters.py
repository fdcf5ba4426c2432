"""Adapters: adapter_config.json, and the names, shapes and dtypes of their tensors."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from bad_inputs.room import Arguments, read_parts
from conftest import write_safetensors

from fuzz import damage
from fuzz.place import Place
from fuzz.safetensors import laid_out

CONFIG, WEIGHTS = "lora/adapter_config.json", "lora/adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0."
SOUND: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "a",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "trainable_token_indices": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "target_parameters": None,
}
KINDS = (
    *(
        "LORA",
        "LOHA",
        "LOKR",
        "IA3",
        "OFT",
        "BOFT",
        "VERA",
        "FOURIERFT",
        "HRA",
        "LN_TUNING",
        "TRAINABLE_TOKENS",
        "VBLORA",
    ),
    *(
        "PREFIX_TUNING",
        "P_TUNING",
        "XLORA",
        "ADALORA",
        "RANDLORA",
        "BONE",
        "MISS",
        "SHIRA",
        "C3A",
        "ROAD",
        "DELORA",
        "x",
    ),
)
PATTERNS = ("q_proj", ".*q_proj", "(a+)+$", "((a|aa)+x?)+b", "[", "x" * 9000, "", "layers.0", "^q", "a{9999}{9999}")
ENDINGS = (
    *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_embedding_A", "lora_magnitude_vector", "weight"),
    *(
        "lora_B.bias",
        "modules_to_save.weight",
        "hada_w1_a",
        "lokr_w1",
        "ia3_l",
        "oft_r.weight",
        "base_layer.bias",
        "x.y",
    ),
    *(
        "token_adapter.trainable_tokens_delta",
        "lora_A",
        "vera_lambda_b",
        "fourierft_spectrum",
        "modules_to_save.default.bias",
    ),
)


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.model("a", layers=1)
        tensors = {
            f"{PREFIX}{module}.lora_{part}.weight": (np.ones(shape, np.float32), "float32")
            for module, rows in (("self_attn.q_proj", 8), ("mlp.up_proj", 16))
            for part, shape in (("A", (2, 8)), ("B", (rows, 2)))
        }
        (place.path / "lora").mkdir()
        write_safetensors(place.path / WEIGHTS, tensors)
        (place.path / CONFIG).write_text(json.dumps(SOUND))
        (place.path / "svd.yaml").write_text("merge_method: svd\nmodels: [{model: lora}, {model: lora}]\n")
        place.recipe("merge_method: passthrough\nmodels: [{model: a+lora}]\n")
        self._header, _ = read_parts(place.path / WEIGHTS)
        return ["lora", "fold", "a", "lora", "-o", "out"]

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        config: Any = json.loads(json.dumps(SOUND))
        header: Any = json.loads(json.dumps(self._header))
        what = dice.randrange(5)
        if what == 0:
            place.put(CONFIG, damage.json_text(config, dice))
        elif what == 1:
            for key in damage.some_of(list(config), dice):
                config[key] = damage.value(dice)
        elif what == 2:
            config["peft_type"] = dice.choice(KINDS)
            config |= {"alpha": 2, "block_size": 2, "n_frequency": 4, "feedforward_modules": [], "oft_block_size": 2}
        elif what == 3:
            key = dice.choice(("rank_pattern", "alpha_pattern"))
            number = dice.choice((1, 2, 0, -1, 1e300, "2", 10**30))
            config[key] = dict.fromkeys([*damage.some_of(PATTERNS, dice)], number)
            if damage.chance(dice, 0.2):
                config[key] |= {f"m.{i}": 2 for i in range(5000)}
        if what >= 2 or damage.chance(dice, 0.3):
            for name in damage.some_of(list(header), dice):
                stem = name.rpartition(".lora_")[0] or name
                header[f"{stem}.{dice.choice(ENDINGS)}"] = (
                    header[name] if damage.chance(dice, 0.5) else header.pop(name)
                )
            header, data = laid_out(header, dice)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            place.put(WEIGHTS, len(text).to_bytes(8, "little") + text + data)
        if what:
            place.put(CONFIG, json.dumps(config).encode("utf-8", "surrogatepass"))
        fold = ["lora", "fold", "a", "lora", "-o", "out"]
        return dice.choice((fold, fold, ["lora", "show", "lora"], ["plan", "r.yaml"], ["plan", "svd.yaml"]))
