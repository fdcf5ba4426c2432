"""Weight files: header, offsets, shapes, dtypes, names and bytes."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from bad_inputs.room import Arguments, read_parts

from fuzz import damage
from fuzz.place import LINEAR, Place, a_run

FILE = "b/model.safetensors"
RECIPES = (
    LINEAR + "parameters: {normalize: true}\nallow: [nonfinite]\n",
    "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5}}]\n",
    "merge_method: della\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5}}]\n"
    "parameters: {epsilon: 0.1}\n",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
    "merge_method: passthrough\nmodels: [{model: b}]\ndtype: bfloat16\nallow: [overflow, nonfinite]\n",
)


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(layers=1)
        self._header, self._data = read_parts(place.path / FILE)
        return place.recipe(RECIPES[0])

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        place.put("r.yaml", dice.choice(RECIPES))
        header: Any = json.loads(json.dumps(self._header))
        data, whole = self._data, place.sound(FILE)
        match dice.randrange(6):
            case 0:
                until = dice.choice((8, len(whole) - len(data), None))
                place.put(FILE, damage.in_bytes(whole, dice, until))
                return verb(dice)
            case 1:
                text = damage.json_text(header, dice)
            case 2:
                header, data = laid_out(header, dice)
                text = json.dumps(header).encode("utf-8", "surrogatepass")
            case 3:
                for name in damage.some_of(list(header), dice):
                    header[name] = damage.in_tree(header[name], dice)
                text = json.dumps(header).encode("utf-8", "surrogatepass")
            case 4:
                count = dice.choice((10, 300, 2000))
                empty = {"dtype": "F32", "shape": damage.sizes(dice), "data_offsets": [0, 0]}
                header = {f"extra.{i}": empty for i in range(count)} | header
                text = json.dumps(header).encode()
            case _:
                data = damage.in_bytes(data, dice)
                text = json.dumps(header).encode()
        length = len(text) if damage.chance(dice, 0.9) else dice.choice((0, 1, 2**31, 2**63, len(text) + 1))
        place.put(FILE, length.to_bytes(8, "little") + text + data)
        return verb(dice)


def laid_out(header: dict[str, Any], dice: random.Random) -> tuple[dict[str, Any], bytes]:
    """Some tensors of other shapes, dtypes and names, with offsets and bytes that are right."""
    names = damage.some_of([name for name in header if name != "__metadata__"], dice)
    for name in names:
        info = header[name]
        match dice.randrange(4):
            case 0:
                info["shape"] = damage.sizes(dice)
            case 1:
                info["dtype"] = dice.choice(
                    ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "F4", "U8")
                )
            case 2:
                name_scale = f"{name}_{dice.choice(('scale', 'scale_inv', 'zero_point'))}"
                header[name_scale] = {"dtype": "F32", "shape": dice.choice(([], [1], [1, 1], [8, 1], [2, 2]))}
                info["dtype"] = "F8_E4M3"
            case 3:
                header[str(damage.value(dice))] = header.pop(name)
    at, parts = 0, []
    for name, info in header.items():
        if name == "__metadata__" or not isinstance(info, dict):
            continue
        shape = info.get("shape")
        sized = isinstance(shape, list) and all(isinstance(size, int) and 0 <= size < 2**16 for size in shape)
        count = math.prod(shape) if sized and isinstance(shape, list) else 0
        size = min(count, 100_000) * {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(info.get("dtype", ""), 1)
        info["data_offsets"] = [at, at + size]
        parts.append(dice.randbytes(size))
        at += size
    return header, b"".join(parts)


def verb(dice: random.Random) -> Arguments:
    others: tuple[Arguments, ...] = (
        ["diff", "a", "b"],
        ["diff", "b", "a", "--base", "a"],
        ["convert", "b", "-o", "out", "--dtype", "bfloat16"],
        ["lora", "extract", "b", "--base", "a", "-o", "out", "--rank", "2", "--threads", "1"],
    )
    return dice.choice(others) if damage.chance(dice, 0.25) else a_run(dice)
