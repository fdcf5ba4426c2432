"""What merges leave: manifests and results that verify reads, and journals that a killed run goes on from."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from bad_inputs.room import Arguments, call

from fuzz import damage
from fuzz.place import Place

RECIPE = """\
merge_method: ties
base_model: a
models: [{model: b, parameters: {weight: 1, density: 0.5}}]
"""
RUN = ["run", "r.yaml", "-o", "out", "--threads", "2", "--quiet", "--shard-size", "3kB"]
JOURNAL, MANIFEST = "kept/journal.jsonl", "whole/merge_manifest.json"


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(layers=1)
        place.recipe(RECIPE)
        assert call(RUN)[0] == 0
        Path("out").rename("whole")
        with mock.patch("merge.output.writer.OutputDirectory.complete", side_effect=KeyboardInterrupt):
            assert call(RUN)[0] == 130
        Path("out.partial").rename("kept")
        self._whole = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
        return ["verify", "whole"]

    def damage(self, place: Place, dice: random.Random) -> Arguments | Any:
        if damage.chance(dice, 0.6):
            if damage.chance(dice, 0.6):
                place.put(MANIFEST, damage.json_text(json.loads(self._whole["merge_manifest.json"]), dice))
            else:
                name = dice.choice(list(self._whole))
                place.put(f"whole/{name}", damage.in_bytes(self._whole[name], dice))
            return dice.choice((["verify", "whole"], ["verify", "whole", "--json"], ["verify", "whole", "--sha256"]))
        shutil.copytree("kept", "out.partial")
        journal = Path("out.partial/journal.jsonl")
        lines = journal.read_bytes().splitlines(keepends=True)
        match dice.randrange(4):
            case 0:
                journal.write_bytes(damage.in_bytes(journal.read_bytes(), dice))
            case 1:
                seal, line = json.loads(dice.choice(lines))
                journal.write_bytes(b"".join(lines) + damage.json_text([seal, line], dice) + b"\n")
            case 2:
                journal.write_bytes(b"".join([lines[0], *dice.sample(lines[1:], len(lines) - 1)]))
            case _:
                name = dice.choice(sorted(path.name for path in Path("kept").iterdir() if path.is_file()))
                path = Path("out.partial", name)
                path.write_bytes(damage.in_bytes(path.read_bytes(), dice))
        return self.resumed

    def resumed(self) -> None:
        """Whatever is left: what the run then gives is right to the byte, or it is refused."""
        from merge.errors import UsageError

        code, _, err = call(RUN)
        if code == 0:
            assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == self._whole
        else:
            assert code in (1, 2), err
            assert not Path("out").exists()
            raise UsageError(err.removeprefix("merge: "))
