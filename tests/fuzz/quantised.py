"""Quantised models: parts of weights that are missing, too many or of other shapes, and descriptions that lie."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from bad_inputs.room import Arguments
from quantized import Tensors, awq, bitsandbytes_4bit, compressed, gptq, mxfp4
from safetensors.torch import save

from fuzz import damage
from fuzz.place import Place
from fuzz.safetensors import laid_out

CONFIG, WEIGHTS = "b/config.json", "b/model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
FLOATS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.model("b", layers=1)
        self._config = json.loads((place.path / CONFIG).read_text())
        self._kinds: list[tuple[Tensors, dict[str, Any]]] = [
            (bitsandbytes_4bit(64, 64, "nf4", True, "float32")[0], {"quant_method": "bitsandbytes"}),
            (gptq(64, 64, 4, 32, act_order=True)[0], {"quant_method": "gptq", "bits": 4}),
            (gptq(64, 96, 3, 32)[0], {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
            (awq(64, 64, 32)[0], {"quant_method": "awq", "version": "gemm"}),
            (mxfp4(2, 32, 2), {"quant_method": "mxfp4"}),
            compressed(64, 64, "pack-quantized", **INTEGERS)[:2],
            compressed(64, 64, "nvfp4-pack-quantized", **FLOATS)[:2],
        ]
        place.recipe("merge_method: passthrough\nmodels: [{model: b}]\ndtype: float32\nallow: [nonfinite, overflow]\n")
        self._write(place, *self._kinds[0])
        return ["run", "r.yaml", "-o", "out", "--threads", "1", "--quiet"]

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        stored, config = dice.choice(self._kinds)
        whole = save(_named(stored))
        length = int.from_bytes(whole[:8], "little")
        header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        match dice.randrange(6):
            case 0:  # parts are missing, of other shapes and dtypes, or called otherwise
                header, data = laid_out(header, dice)
            case 1:  # the same bytes in other shapes
                for name in damage.some_of(list(header), dice):
                    shape = header[name]["shape"]
                    dice.shuffle(shape)
                    if len(shape) > 1 and damage.chance(dice, 0.5):
                        header[name]["shape"] = [int(np.prod(shape))]
            case 2:  # names of each other's parts
                for name in damage.some_of(list(header), dice):
                    header[f"{name}{dice.choice(('_packed', '.absmax', '.qweight', '_scale', '_blocks', '.SCB'))}"] = (
                        header.pop(name)
                    )
            case 3:  # numbers: indices of groups, shapes, JSON in a tensor
                data = damage.in_bytes(data, dice)
            case 4:
                config = damage.in_tree(config, dice)
            case _:  # another format's config
                config = dice.choice(self._kinds)[1]
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        place.put(WEIGHTS, len(text).to_bytes(8, "little") + text + data)
        config = self._config | {"quantization_config": config}
        place.put(CONFIG, json.dumps(config).encode("utf-8", "surrogatepass"))
        run = ["run", "r.yaml", "-o", "out", "--threads", "1", "--quiet"]
        convert = ["convert", "b", "-o", "out", "--threads", "1", "--allow", "nonfinite", "--allow", "overflow"]
        return dice.choice((run, run, convert, ["plan", "r.yaml"]))

    def _write(self, place: Place, stored: Tensors, config: dict[str, Any]) -> None:
        (place.path / WEIGHTS).write_bytes(save(_named(stored)))
        (place.path / CONFIG).write_text(json.dumps(self._config | {"quantization_config": config}))


def _named(stored: Tensors) -> Tensors:
    """As tensors of a layer."""
    return {f"{Q}.{name.removeprefix('l.').removeprefix('e.')}": part.contiguous() for name, part in stored.items()}
