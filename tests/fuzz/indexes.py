"""Indexes of shards: names of files and tensors."""

from __future__ import annotations

import json
import random
from typing import Any

from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import LINEAR, Place, a_run

FILE = "b/model.safetensors.index.json"
FILES = (
    "",
    ".",
    "..",
    "../a/config.json",
    "/etc/passwd",
    "\x00",
    "a/b",
    "config.json",
    "x" * 300,
    "C:\\x",
    "~",
    "\ud800",
)


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(layers=1, shards=3)
        self._index = json.loads((place.path / FILE).read_text())
        return place.recipe(LINEAR)

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        index: Any = json.loads(json.dumps(self._index))
        names = index["weight_map"]
        match dice.randrange(5):
            case 0:
                place.put(FILE, damage.json_text(index, dice))
                return a_run(dice)
            case 1:
                for name in damage.some_of(list(names), dice):
                    names[name] = dice.choice((*FILES, *names.values()))
            case 2:
                count = dice.choice((10, 1000, 50_000))
                file = dice.choice(("model-00001-of-00003.safetensors", "{}.safetensors", "x/{}"))
                names |= {f"{dice.random()}.{i}": file.format(i) for i in range(count)}
            case 3:
                for name in damage.some_of(list(names), dice):
                    names[str(damage.value(dice))] = names.pop(name)
            case _:
                files = [f"b/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
                for file in damage.some_of(files, dice):
                    other = place.sound(dice.choice(files))
                    place.put(file, dice.choice((other, b"", damage.in_bytes(other, dice))))
                if damage.chance(dice, 0.3):
                    place.remove(dice.choice((FILE, *files)))
        place.put(FILE, json.dumps(index).encode("utf-8", "surrogatepass"))
        return a_run(dice)
