"""merge verify: every byte of every file counts, and what lies beside them too."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bad_inputs.room import Room, call, edit_header

from merge import verify_output
from merge.errors import MergeError
from merge.output.manifest import MANIFEST

N_FLIPS = 24  # of each file
EXTRACT = ["lora", "extract", "b", "--base", "a", "-o", "out", "--rank", "2"]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    monkeypatch.chdir(tmp_path)
    return Room(tmp_path, contextlib.ExitStack())


def is_seen(directory: str) -> bool:
    try:
        return bool(verify_output(directory).problems)
    except MergeError:  # not even JSON
        return True


@pytest.mark.parametrize("made", ["merged", "sharded", "extracted"])
def test_every_flipped_bit_is_found_in_every_file(room: Room, made: str) -> None:
    arguments = room.pair_and_recipe()
    arguments = {"merged": arguments, "sharded": [*arguments, "--shard-size", "6kB"], "extracted": EXTRACT}[made]
    assert call(arguments)[0] == 0
    assert not is_seen("out")
    dice, unseen, files = random.Random(1), [], sorted(path for path in Path("out").rglob("*") if path.is_file())
    assert {"merged": 6, "sharded": 8, "extracted": 4}[made] == len(files)
    for path in files:
        data = path.read_bytes()
        for place in {0, len(data) - 1, *(dice.randrange(len(data)) for _ in range(N_FLIPS))}:
            flipped = bytearray(data)
            flipped[place] ^= 1 << dice.randrange(8)
            path.write_bytes(flipped)
            unseen += [] if is_seen("out") else [(path, place)]
        for other in (data[:-1], data + b"\n"):
            path.write_bytes(other)
            unseen += [] if is_seen("out") else [(path, len(other))]
        path.write_bytes(data)
    assert unseen == []
    assert not is_seen("out")


def test_the_manifests_digest_is_that_of_the_lines_before_it(room: Room) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    *_, digest, brace = (Path("out") / MANIFEST).read_text().splitlines()
    shown = subprocess.run(["sh", "-c", f"head -n -2 out/{MANIFEST} | sha256sum"], capture_output=True, text=True)
    assert digest == f' "digest": "{shown.stdout.split()[0]}"'
    assert brace == "}"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("adapter_config.json", "out/adapter_config.json"),
        ("adapter_model.safetensors", "out/adapter_model.safetensors"),
        ("chat_template.jinja", "out/chat_template.jinja"),
        ("chat_template.json", "out/chat_template.json"),
        ("added_tokens.json", "out/added_tokens.json"),
        ("generation_config.json", "out/generation_config.json"),
        ("pytorch_model.bin", "out/pytorch_model.bin"),
        ("model.safetensors.index.json", "out/model.safetensors.index.json"),
        ("modeling_llama.py", "out/modeling_llama.py"),
        ("tokenizer.model", "out/tokenizer.model"),
        ("original/consolidated.00.pth", "out/original"),
        ("1_Pooling/config.json", "out/1_Pooling"),
        (".cache/huggingface/download", None),
        (".gitattributes", None),
        ("LICENSE.txt", None),
        ("NOTES.md", None),
        ("images/scores.png", None),
    ],
)
def test_what_was_added_is_named_if_a_loader_may_read_it(room: Room, added: str, said: str | None) -> None:
    assert call(room.pair_and_recipe())[0] == 0
    (room.path / "out" / added).parent.mkdir(exist_ok=True, parents=True)
    (room.path / "out" / added).write_text("{}")
    assert verify_output("out").problems == (() if said is None else (f"{said}: not part of this merge",))


def test_tensors_without_elements_whose_rows_are_endless(room: Room) -> None:
    arguments = room.pair_and_recipe()
    for name in ("a", "b"):
        edit_header(room.path / name / "model.safetensors", lambda header: with_rows_of(header, 2**40))
    assert call(arguments)[0] == 0
    assert verify_output("out").problems == ()
    edit_header(room.path / "out" / "model.safetensors", lambda header: with_rows_of(header, 2**62))
    assert verify_output("out").problems


def with_rows_of(header: dict[str, Any], length: int) -> None:
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    header["nothing"] = {"dtype": "F32", "shape": [0, length], "data_offsets": [end, end]}
