"""`merge verify` on what is no longer as it was written, or never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.room import Arguments, Room, read_parts, set_up

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


@set_up
def not_an_output(room: Room) -> Arguments:
    room.model("a")
    return ["verify", "a"]


@set_up
def verify_a_file(room: Room) -> Arguments:
    (room.path / "file").write_text("")
    return ["verify", "file"]


@set_up
def verify_endless_name(room: Room) -> Arguments:
    return ["verify", "x" * 300]


@set_up
def tampered_tensor(room: Room) -> Arguments:
    return _changed(room, lambda out: _flip_tensor(out / WEIGHTS))


@set_up
def tampered_header_length(room: Room) -> Arguments:
    return _changed(room, lambda out: _flip(out / WEIGHTS, 7))


@set_up
def tampered_header(room: Room) -> Arguments:
    def rename(out: Path) -> None:
        data = (out / WEIGHTS).read_bytes()
        (out / WEIGHTS).write_bytes(data.replace(b"self_attn.q_proj", b"self_attn.q_poor", 1))

    return _changed(room, rename)


@set_up
def verify_truncated(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1]))


@set_up
def verify_missing_shard(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / SHARD).unlink(), "--shard-size", "6kB")


@set_up
def verify_missing_file(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "config.json").unlink())


@set_up
def verify_edited_file(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "config.json").write_text("{}"))


@set_up
def verify_stranger(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / "model-00009-of-00009.safetensors").write_bytes(b""))


@set_up
def manifest_not_json(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / MANIFEST).write_text('{"format": 2'))


@set_up
def manifest_not_text(room: Room) -> Arguments:
    return _changed(room, lambda out: (out / MANIFEST).write_bytes(b"\xff\xfe\xfd"))


@set_up
def newer_manifest(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.update(format=3))


@set_up
def manifest_without_tensors(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.pop("tensors"))


@set_up
def manifest_with_list(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest.update(tensors=[1]))


@set_up
def manifest_without_digest(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest["tensors"].update({Q: {}}))


@set_up
def manifest_climbs_out(room: Room) -> Arguments:
    return _with_manifest(room, lambda manifest: manifest["files"].update({"../a/config.json": "00"}))
