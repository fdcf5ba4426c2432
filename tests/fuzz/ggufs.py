"""GGUF files: header, metadata, tensor infos and blocks; a byte at a time, or counts, types and places that lie."""

from __future__ import annotations

import random
import struct

from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import Place

FILE = "b.gguf"
RECIPE = "merge_method: passthrough\nmodels: [{model: b.gguf}]\nallow: [overflow, nonfinite]\n"
_COUNTS = (0, 1, 2, 3, 5, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1)


class Format:
    def set_up(self, place: Place) -> Arguments:
        from ggufs_of import small_gguf

        small_gguf(place.path / FILE)
        self._whole = (place.path / FILE).read_bytes()
        self._data = self._whole.rindex(b"output_norm.weight") + 64
        return place.recipe(RECIPE)

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        whole = bytearray(self._whole)
        match dice.randrange(4):
            case 0:
                place.put(FILE, damage.in_bytes(bytes(whole), dice, self._data))
            case 1:  # a number somewhere in the header
                at = dice.randrange(4, self._data - 8)
                whole[at : at + 8] = struct.pack("<Q", dice.choice(_COUNTS))
                place.put(FILE, bytes(whole))
            case 2:
                at = dice.randrange(4, self._data - 4)
                whole[at : at + 4] = struct.pack("<I", dice.choice((*range(14), 39, 2**31)))
                place.put(FILE, bytes(whole))
            case _:
                place.put(FILE, damage.in_bytes(bytes(whole), dice))
        run = ["run", "r.yaml", "-o", "out", "--threads", "1", "--quiet"]
        return dice.choice((run, ["plan", "r.yaml"], ["convert", FILE, "-o", "out"]))
