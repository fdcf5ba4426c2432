"""Files of statistics, which regmean and fisher read."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from bad_inputs.room import Arguments, read_parts
from conftest import llama_shapes, write_safetensors

from fuzz import damage
from fuzz.place import Place, a_run
from fuzz.safetensors import laid_out

RECIPE = "merge_method: {}\nmodels:\n- {{model: a, statistics: a.{}}}\n- {{model: b, statistics: b.{}}}\n"


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(layers=1)
        self._headers: dict[str, Any] = {}
        for name in "ab":
            for kind in ("gram", "fisher"):
                tensors = {
                    f"{kind}.{tensor}": (np.ones(shape[-1:] * 2 if kind == "gram" else shape, np.float32), "float32")
                    for tensor, shape in llama_shapes(1, 8, False).items()
                    if kind == "fisher" or "proj" in tensor
                }
                write_safetensors(place.path / f"{name}.{kind}", tensors)
                self._headers[kind] = read_parts(place.path / f"{name}.{kind}")
        place.recipe(RECIPE.format("fisher", "fisher", "fisher"), "f.yaml")
        return place.recipe(RECIPE.format("regmean", "gram", "gram"))

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        kind = dice.choice(("gram", "fisher"))
        header, data = json.loads(json.dumps(self._headers[kind][0])), self._headers[kind][1]
        if damage.chance(dice, 0.5):
            header, data = laid_out(header, dice)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
        else:
            text = damage.json_text(header, dice)
        if damage.chance(dice, 0.3):
            data = damage.in_bytes(data, dice)
        place.put(f"b.{kind}", len(text).to_bytes(8, "little") + text + data)
        command = a_run(dice)
        return [word if word != "r.yaml" or kind == "gram" else "f.yaml" for word in command]
