"""torch's files: pickles an opcode at a time, the zip around them, and the format before torch 1.6."""

from __future__ import annotations

import io
import itertools
import pickletools
import random
import struct
import warnings
import zipfile

from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import Place

FILE = "b/pytorch_model.bin"
RECIPE = "merge_method: passthrough\nmodels: [{model: b}]\n"
SHARED = b")" + b"2\x86" * 45  # a tuple of itself twice, 45 levels deep
LONG = b"\x8b" + struct.pack("<i", 4000) + b"\x01" * 4000


class Format:
    def set_up(self, place: Place) -> Arguments:
        import torch

        place.model("b", layers=1)
        (place.path / "b/model.safetensors").unlink()
        tensors = {
            "x": torch.arange(6.0).reshape(2, 3).T,
            "y": torch.ones(3, dtype=torch.bfloat16),
            "n": torch.ones(()),
        }
        self._files = {}
        for is_zip in (True, False):
            torch.save(tensors, place.path / FILE, _use_new_zipfile_serialization=is_zip)
            self._files[is_zip] = (place.path / FILE).read_bytes()
        with zipfile.ZipFile(io.BytesIO(self._files[True])) as archive:
            self._records = {name: archive.read(name) for name in archive.namelist()}
        return place.recipe(RECIPE)

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        match dice.randrange(8):
            case 0:
                place.put(FILE, damage.in_bytes(self._files[damage.chance(dice, 0.5)], dice))
            case 1:
                place.put(FILE, self._zip(dice, self._records))
            case 2:
                place.put(FILE, self._zip(dice, self._records, odd=True))
            case 3:
                legacy = self._files[False]
                end = legacy.rindex(b".") + 1
                place.put(FILE, in_opcodes(legacy[:end], dice) + legacy[end:])
            case _:
                name = next(name for name in self._records if name.endswith("data.pkl"))
                place.put(FILE, self._zip(dice, self._records | {name: in_opcodes(self._records[name], dice)}))
        run = ["run", "r.yaml", "-o", "out", "--threads", "1", "--quiet"]
        return dice.choice((run, ["plan", "r.yaml"], ["convert", "b", "-o", "out"]))

    def _zip(self, dice: random.Random, records: dict[str, bytes], odd: bool = False) -> bytes:
        """Records stored as torch does it; odd: dropped, doubled, damaged, compressed, or very many."""
        file = io.BytesIO()
        with (
            warnings.catch_warnings(action="ignore"),
            zipfile.ZipFile(file, "w") as archive,
        ):  # of names that are doubled
            for name, data in records.items():
                if odd and damage.chance(dice, 0.1):
                    continue
                if odd and damage.chance(dice, 0.15):
                    data = damage.in_bytes(data, dice)
                kind = zipfile.ZIP_DEFLATED if odd and damage.chance(dice, 0.1) else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name), data, kind)
            if odd and damage.chance(dice, 0.3):
                for i in range(dice.choice((1, 100, 3000))):
                    archive.writestr(zipfile.ZipInfo(dice.choice((f"archive/data/{i}", f"x{i}/data.pkl", "../x"))), b"")
        data = file.getvalue()
        return data if not odd else damage.in_bytes(data, dice) if damage.chance(dice, 0.3) else data


def in_opcodes(data: bytes, dice: random.Random) -> bytes:
    """Opcodes of the pickle dropped, doubled, exchanged, moved, or others put in."""
    places = [place for _, _, place in _opcodes(data)] + [len(data)]
    pieces = [data[begin:end] for begin, end in itertools.pairwise(places)]
    for _ in range(dice.randint(1, 3)):
        i, j = dice.randrange(len(pieces)), dice.randrange(len(pieces))
        match dice.randrange(6):
            case 0:
                pieces[i] = b""
            case 1:
                pieces[i] *= dice.choice((2, 3, 1000))
            case 2:
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case 3:
                pieces[i] += pieces[j]
            case 4:
                pieces[i] = odd_opcodes(dice)
            case _:
                pieces[i] += odd_opcodes(dice)
    return b"".join(pieces)


def _opcodes(data: bytes) -> list[tuple[object, object, int]]:
    """All opcodes of the pickles that follow each other."""
    found, file = [], io.BytesIO(data)
    while file.tell() < len(data):
        begin = 0 if not found else file.tell()
        found += [(opcode, argument, int(place or 0)) for opcode, argument, place in pickletools.genops(file)]
        assert file.tell() > begin
    return found


def odd_opcodes(dice: random.Random) -> bytes:
    many = dice.choice((3, 1000, 100_000))
    number = struct.pack("<i", dice.choice((-1, 0, 2**31 - 1)))
    text = dice.choice(damage.TEXTS).encode("utf-8", "surrogatepass")
    return dice.choice(
        (
            *(SHARED, LONG, b"J" + number, b"M\xff\xff", b"K\x00", b"G" + struct.pack(">d", dice.choice((0.0, 1e300)))),
            b"X" + struct.pack("<I", len(text)) + text,
            b"X\xff\xff\xff\x7f",
            b"V" + b"1" * 5000 + b"\n",
            b"I" + b"1" * many + b"\n",
            b"L" + b"9" * 5000 + b"L\n",
            *(b"}" * many, b"]" * many, b"(" * many, b"N" * many, b")" * many, b"2" * many, b"0", b"1"),
            b"}" + b"q\x00" * many,
            b"](" + b"N" * many + b"e",
            b"r" + struct.pack("<I", 2**31),
            *(b"h\x00", b"j" + struct.pack("<I", 5), b"g5\n", b"\x94"),
            b"cos\nsystem\n",
            b"cbuiltins\neval\n",
            b"ccollections\nOrderedDict\n" + b"(" + b"](NNeNNe\x85" + b"tR",
            b"ctorch\n" + text.replace(b"\n", b"") + b"\n",
            b"ctorch\nSize\n](" + b"K\x01" * min(many, 5000) + b"e\x85R",
            b"\x93",
            b"\x95" + struct.pack("<Q", 2**40),
            *(
                b"b",
                b"s",
                b"u",
                b"t",
                b"\x85",
                b"\x86",
                b"\x87",
                b"R",
                b"Q",
                b"a",
                b"e",
                b"d",
                b"l",
                b"o",
                b"i",
                b"\x81",
            ),
            *(b"\x82\x01", b"\x8f", b"\x90", b"\x96", b"\x97", b"."),
        )
    )
