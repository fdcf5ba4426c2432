"""`merge verify` on what is no longer as it was written, or never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.room import Arguments, Room, case, read_parts

Q = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"
MANIFEST = "merge_manifest.json"
SHARD = "model-00002-of-00002.safetensors"
DIFFERS = "merge: out differs from its manifest in 1 place"


def _changed(room: Room, change: Callable[[Path], object], *options: str) -> Arguments:
    """A merge, changed after it was written."""
    room.run_before([*room.pair_and_recipe(), "--quiet", *options])
    change(room.path / "out")
    return ["verify", "out"]


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _flip_tensor(path: Path) -> None:
    header, data = read_parts(path)
    _flip(path, path.stat().st_size - len(data) + header[Q]["data_offsets"][0])


def _with_manifest(room: Room, change: Callable[[dict[str, Any]], object]) -> Arguments:
    def edit(out: Path) -> None:
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return _changed(room, edit)


@case("verify: not an output of a merge", 1, f"a/{MANIFEST} does not exist: a is not a finished output of merge run")
def not_an_output(room: Room) -> Arguments:
    room.model("a")
    return ["verify", "a"]


@case("verify: no such directory", 1, f"nowhere/{MANIFEST} does not exist")
def verify_nowhere(room: Room) -> Arguments:
    return ["verify", "nowhere"]


@case("verify: a file", 1, "is not a finished output of merge run")
def verify_a_file(room: Room) -> Arguments:
    (room.path / "file").write_text("")
    return ["verify", "file"]


@case("verify: a name of 300 letters", 1, "File name too long")
def verify_endless_name(room: Room) -> Arguments:
    return ["verify", "x" * 300]


@case(
    "verify: one bit of a tensor changed",
    1,
    f"{Q} in out/model.safetensors: its bytes changed",
    DIFFERS,
    on_stdout=True,
)
def tampered_tensor(room: Room) -> Arguments:
    return _changed(room, lambda out: _flip_tensor(out / WEIGHTS))


@case("verify: one bit of the header length changed", 1, "out/model.safetensors: header length", on_stdout=True)
def tampered_header_length(room: Room) -> Arguments:
    return _changed(room, lambda out: _flip(out / WEIGHTS, 7))


@case("verify: a tensor renamed in the header", 1, "out/model.safetensors: its header changed", on_stdout=True)
def tampered_header(room: Room) -> Arguments:
    def rename(out: Path) -> None:
        data = (out / WEIGHTS).read_bytes()
        (out / WEIGHTS).write_bytes(data.replace(b"self_attn.q_proj", b"self_attn.q_poor", 1))

    return _changed(room, rename)


@case("verify: a weight file cut short", 1, "out/model.safetensors:", "bytes, expected", on_stdout=True)
def verify_truncated(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1]))


@case("verify: a weight file is missing", 1, f"out/{SHARD}: missing", on_stdout=True)
def verify_missing_shard(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / SHARD).unlink(), "--shard-size", "6kB")


@case("verify: config.json is missing", 1, "out/config.json: missing", DIFFERS, on_stdout=True)
def verify_missing_file(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "config.json").unlink())


@case("verify: config.json was edited", 1, "out/config.json: changed since the merge", DIFFERS, on_stdout=True)
def verify_edited_file(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "config.json").write_text("{}"))


@case(
    "verify: a weight file that does not belong",
    1,
    "out/model-00009-of-00009.safetensors: not part of this merge",
    DIFFERS,
    on_stdout=True,
)
def verify_stranger(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "model-00009-of-00009.safetensors").write_bytes(b""))


@case("verify: the manifest is not JSON", 1, f"out/{MANIFEST} is not valid JSON")
def manifest_not_json(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / MANIFEST).write_text('{"format": 2'))


@case("verify: the manifest is not text", 1, f"out/{MANIFEST} is not valid JSON")
def manifest_not_text(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / MANIFEST).write_bytes(b"\xff\xfe\xfd"))


@case("verify: the manifest is of a newer format", 1, f"out/{MANIFEST}: expected format 2, found 3")
def newer_manifest(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.update(format=3))


@case("verify: the manifest lacks its tensors", 1, f'out/{MANIFEST}: "tensors"', "was damaged")
def manifest_without_tensors(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.pop("tensors"))


@case("verify: the manifest has a list of tensors", 1, f'out/{MANIFEST}: "tensors"', "was damaged")
def manifest_with_list(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.update(tensors=[1]))


@case("verify: a tensor without a digest in the manifest", 1, f'out/{MANIFEST}: "tensors"', "was damaged")
def manifest_without_digest(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest["tensors"].update({Q: {}}))


@case("verify: a manifest that names ../a", 1, f'out/{MANIFEST}: "files"', "was damaged")
def manifest_climbs_out(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest["files"].update({"../a/config.json": "00"}))
