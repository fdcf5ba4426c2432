"""Damaged, hostile and foreign weight files and model directories."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs.room import Arguments, Room, case, edit_header, read_parts, write_parts

Q = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _with_b(room: Room, change: Callable[[Path], object], **same: Any) -> Arguments:
    """a, and b changed after it was written, in a linear merge."""
    arguments = room.pair_and_recipe(**same)
    change(room.path / "b")
    return arguments


def _with_header(room: Room, change: Callable[[dict[str, Any]], object]) -> Arguments:
    return _with_b(room, lambda b: edit_header(b / WEIGHTS, change))


def _with_bytes(room: Room, data: bytes, name: str = WEIGHTS) -> Arguments:
    return _with_b(room, lambda b: (b / name).write_bytes(data))


def _with_index(room: Room, change: Callable[[dict[str, str]], object]) -> Arguments:
    def edit(b: Path) -> None:
        index = json.loads((b / INDEX).read_text())
        change(index["weight_map"])
        (b / INDEX).write_text(json.dumps(index))

    return _with_b(room, edit, shards=2)


# --- safetensors files -------------------------------------------------------------------------------------------


@case("a shard cut short", 1, "b/model.safetensors", "truncated, 100 bytes are missing", "Download the file again")
def truncated_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: os.truncate(b / WEIGHTS, (b / WEIGHTS).stat().st_size - 100))


@case("a file cut inside its header", 1, "b/model.safetensors", "goes beyond the file", "Download the file again")
def truncated_header(room: Room) -> Arguments:
    return _with_b(room, lambda b: os.truncate(b / WEIGHTS, 64))


@case("header length beyond the file", 1, "b/model.safetensors", "header length 4,096 goes beyond the file")
def header_beyond_file(room: Room) -> Arguments:
    return _with_bytes(room, (4096).to_bytes(8, "little") + b"{}")


@case("header length of 2^63", 1, "b/model.safetensors", "header length 9,223,372,036,854,775,808 goes beyond")
def header_of_exabytes(room: Room) -> Arguments:
    return _with_bytes(room, (1 << 63).to_bytes(8, "little") + b"{}")


@case("header over the format's limit", 1, "more than the allowed 100,000,000 bytes")
def header_over_limit(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).write_bytes((100_000_001).to_bytes(8, "little") + b"{")
        os.truncate(b / WEIGHTS, 100_000_100)  # sparse

    return _with_b(room, change)


@case("header that is not JSON", 1, "b/model.safetensors: header is not valid JSON", "Download the file again")
def header_not_json(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b'{"a": [1, 2', b""))


@case("header that is not text", 1, "b/model.safetensors: header is not UTF-8 text")
def header_not_text(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b"{\xff\xfe}", b""))


@case("header nested without end", 1, "b/model.safetensors: header is not valid JSON")
def header_nested(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b'{"a":' * 100_000, b""))


@case("header that is a list", 1, "header is a JSON list, expected an object")
def header_list(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b"[]", b""))


@case("overlapping offsets", 1, "b/model.safetensors", "overlaps", "header is damaged: download the file again")
def overlapping_offsets(room: Room) -> Arguments:
    def change(header: dict[str, Any]) -> None:
        tensors = [name for name in header if name != "__metadata__"]
        sizes = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in tensors}
        one, other = [name for name in tensors if sizes[name] == sizes[Q]][:2]
        header[other]["data_offsets"] = header[one]["data_offsets"]

    return _with_header(room, change)


@case("a hole between tensors", 1, "b/model.safetensors", "a hole of 8 bytes between")
def hole(room: Room) -> Arguments:
    def change(b: Path) -> None:
        header, data = read_parts(b / WEIGHTS)
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0]:
                entry["data_offsets"] = [place + 8 for place in entry["data_offsets"]]
        write_parts(b / WEIGHTS, header, data + bytes(8))

    return _with_b(room, change)


@case("one name twice in the header", 1, 'header is not valid JSON (duplicate: the name "x" is there twice)')
def duplicate_names(room: Room) -> Arguments:
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, f"{{{entry},{entry}}}".encode(), bytes(4)))


@case("a dtype that nobody knows", 1, f"{Q}: unknown dtype 'F33'", "Known: F64, F32")
def unknown_dtype(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(dtype="F33"))


@case("a dtype of less than a byte (F4)", 1, f"{Q}: dtype F4 packs several values into a byte", "Dequantise")
def packed_dtype(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(dtype="F4"))


@case("shape and bytes that disagree", 1, f"{Q}: F32 [9, 8]: expected 288 bytes, found 256")
def shape_and_bytes(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=[9, 8]))


@case("a shape that overflows", 1, f"{Q}: shape [4294967296, 4294967296, 4294967296] of F32 overflows")
def shape_overflows(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=[1 << 32, 1 << 32, 1 << 32]))


@case("a shape with a text in it", 1, f"{Q}: shape: expected a list of integers")
def shape_of_text(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=["8", 8]))


@case("a negative offset", 1, f"{Q}: data_offsets [-4, 0] are negative")
def negative_offset(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(data_offsets=[-4, 0]))


@case("bytes after the last tensor", 1, "b/model.safetensors: 7 trailing bytes after the last tensor")
def trailing_bytes(room: Room) -> Arguments:
    def change(b: Path) -> None:
        header, data = read_parts(b / WEIGHTS)
        write_parts(b / WEIGHTS, header, data + bytes(7))

    return _with_b(room, change)


@case("an empty weight file", 1, "b/model.safetensors: is empty (0 bytes). Download the file again")
def empty_weight_file(room: Room) -> Arguments:
    return _with_bytes(room, b"")


@case("a Git LFS pointer", 1, "b/model.safetensors: is a Git LFS pointer", "git lfs pull")
def lfs_pointer(room: Room) -> Arguments:
    return _with_bytes(room, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n")


@case("a saved web page", 1, "b/model.safetensors: is a web page, not weights")
def web_page(room: Room) -> Arguments:
    return _with_bytes(room, b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


@case("weights that are a directory", 1, "b/model.safetensors: is not a file")
def weights_are_a_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        (b / WEIGHTS).mkdir()

    return _with_b(room, change)


@case("weights that are a named pipe", 1, "b/model.safetensors: is not a file")
def weights_are_a_pipe(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        os.mkfifo(b / WEIGHTS)

    room.watch = False
    return _with_b(room, change)


# --- shards and indexes ------------------------------------------------------------------------------------------


@case("an index that names a missing file", 1, INDEX, "names other.safetensors, which is not there")
def index_names_missing_file(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "other.safetensors"}))


@case("an index that names ../x", 1, INDEX, '"../x.safetensors", which climbs out of the directory', "do not trust")
def index_climbs_out(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "../x.safetensors"}))


@case("an index that names an absolute path", 1, INDEX, '"/etc/passwd", which is not a path inside the directory')
def index_names_absolute_path(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "/etc/passwd"}))


@case("an index with a tensor that no shard has", 1, "extra.weight: listed in", "but not in the file")
def index_lists_absent_tensor(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({"extra.weight": SHARD}))


@case("an index that lacks a tensor", 1, "b/model-", f"{Q}: in the file but not listed in {INDEX}")
def index_lacks_tensor(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.pop(Q))


@case("an index that puts a tensor into another shard", 1, f"{Q}: is in this file, but {INDEX} says {SHARD}")
def index_says_other_shard(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: SHARD}))


@case("an index without a weight_map", 1, f'b/{INDEX}: has no "weight_map"')
def index_without_map(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / INDEX).write_text("{}"), shards=2)


@case("an index that is not JSON", 1, f"b/{INDEX}: is not valid JSON")
def index_not_json(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / INDEX).write_text('{"weight_map": '), shards=2)


@case("a shard that is not there", 1, f"b/{INDEX}", f"names {SHARD}, which is not there")
def absent_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / SHARD).unlink(), shards=2)


@case("shards without an index, one missing", 1, "expected 2 shards, found 1 (shard 00002 is not there)")
def absent_shard_without_index(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / INDEX).unlink()
        (b / SHARD).unlink()

    return _with_b(room, change, shards=2)


@case("an empty shard among good ones", 1, f"b/{SHARD}: is empty (0 bytes)")
def empty_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / SHARD).write_bytes(b""), shards=2)


@case("one tensor in two shards", 1, "is in two files")
def tensor_in_two_shards(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / INDEX).unlink()
        shutil.copy(b / "model-00001-of-00002.safetensors", b / SHARD)

    return _with_b(room, change, shards=2)


@case("two safetensors files without an index", 1, "has 2 safetensors files (x.safetensors, y.safetensors)")
def two_files_without_index(room: Room) -> Arguments:
    def change(b: Path) -> None:
        shutil.copy(b / WEIGHTS, b / "x.safetensors")
        (b / WEIGHTS).rename(b / "y.safetensors")

    return _with_b(room, change)


@case("a weight file that links out of its directory", 1, "is a symbolic link to", "outside the model's directory")
def link_out_of_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        (b / WEIGHTS).symlink_to("../a/model.safetensors")

    return _with_b(room, change)


@case("a tokenizer that links out of its directory", 1, "a/tokenizer.json: is a symbolic link to /etc/hostname")
def tokenizer_links_out(room: Room) -> Arguments:
    arguments = room.pair_and_recipe()
    (room.path / "a" / "tokenizer.json").unlink()
    (room.path / "a" / "tokenizer.json").symlink_to("/etc/hostname")
    return arguments


# --- directories -------------------------------------------------------------------------------------------------


@case("an empty directory", 1, "b: is empty. Name a directory with config.json and model.safetensors")
def empty_directory(room: Room) -> Arguments:
    room.model("a")
    (room.path / "b").mkdir()
    return room.recipe()


@case("a directory without weights", 1, "b: has no weights in it, only config.json, tokenizer.json")
def directory_without_weights(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).unlink())


@case("an adapter directory", 1, "b: is an adapter (adapter_config.json), not a whole model", 'Write "BASE+')
def adapter_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).rename(b / "adapter_model.safetensors")
        (b / "adapter_config.json").write_text("{}")

    return _with_b(room, change)


@case("a directory with GGUF files only", 1, "b: holds GGUF weights (q4.gguf)", "convert this one with transformers")
def gguf_directory(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).rename(b / "q4.gguf"))


@case("weights in their publisher's own format", 1, "publisher's own format (consolidated.00.pth)")
def publishers_format(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).rename(b / "consolidated.00.pth"))


@case("no config.json", 1, "b: has weights but no config.json", "Copy config.json")
def no_config(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / "config.json").unlink())


@case("config.json that is not JSON", 1, "b/config.json: is not valid JSON", "Download the file again")
def broken_config(room: Room) -> Arguments:
    return _with_bytes(room, b"{broken", "config.json")


@case("config.json that is a list", 1, "b/config.json: holds a list, expected a JSON object")
def config_is_a_list(room: Room) -> Arguments:
    return _with_bytes(room, b"[]", "config.json")


@case("config.json nested without end", 1, "b/config.json: nests deeper than 64 levels")
def nested_config(room: Room) -> Arguments:
    return _with_bytes(room, b'{"a":' * 800 + b"1" + b"}" * 800, "config.json")


@case("config.json with half a character", 1, "b/config.json: is not valid JSON")
def half_a_character(room: Room) -> Arguments:
    return _with_bytes(room, rb'{"model_type": "\ud800"}', "config.json")


@case("config.json whose text_config is no object", 1, "b/config.json: text_config: expected an object, found 'llama'")
def text_config_is_text(room: Room) -> Arguments:
    return _with_bytes(room, b'{"text_config": "llama"}', "config.json")


@case("a model quantised by GPTQ", 1, "b/config.json: quantization_config", "quantised by gptq are not read")
def gptq(room: Room) -> Arguments:
    room.model("a")
    room.model("b", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    return room.recipe()


@case("a model quantised by AWQ", 1, "b/config.json: quantization_config", "quantised by awq are not read")
def awq(room: Room) -> Arguments:
    room.model("a")
    room.model("b", config={"quantization_config": {"quant_method": "awq"}})
    return room.recipe()


@case("FP8 without its scales", 1, f"{Q}: FP8 without its scales", f"expected {Q}_scale_inv or {Q}_scale")
def fp8_without_scales(room: Room) -> Arguments:
    room.model("a")
    codes = {Q: (np.full((8, 8), 0x38, np.uint8), "float8_e4m3fn")}
    room.model("b", edit=lambda t: t.update(codes), config={"quantization_config": {"quant_method": "fp8"}})
    return room.recipe()


@case("a hub id that is not in the cache, offline", 1, "org/absent: not a local directory", "HF_HUB_OFFLINE is set")
def hub_id_offline(room: Room) -> Arguments:
    room.model("a")
    room.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    room.patch("huggingface_hub.constants.HF_HUB_CACHE", str(room.path / "cache"))
    return room.recipe("merge_method: passthrough\nmodels: [{model: org/absent}]\n")


# --- torch pickles -----------------------------------------------------------------------------------------------


class Payload:
    """A pickle that makes a file where it is loaded, if it is allowed to run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("the-code-was-run",)


def _with_pickle(room: Room, save: Callable[[Path], object]) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        save(b / "pytorch_model.bin")

    return _with_b(room, change)


def _torch_save(value: Any, cut: int = 0, is_zip: bool = True) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        import torch

        torch.save(value, path, _use_new_zipfile_serialization=is_zip)
        os.truncate(path, path.stat().st_size - cut)

    return save


@case("a pickle with code in it (zip)", 1, "contains code (posix.mkdir)", "not loaded, and nothing was run")
def pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": Payload()}))


@case("a pickle with code in it (before torch 1.6)", 1, "contains code (posix.mkdir)", "nothing was run")
def legacy_pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": Payload()}, is_zip=False))


@case("a plain pickle with code in it", 1, "pytorch_model.bin: contains code (posix.mkdir)")
def plain_pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, lambda path: path.write_bytes(pickle.dumps(Payload())))


@case("a torch zip cut short", 1, "pytorch_model.bin: the zip is truncated or damaged", "Download the file again")
def truncated_zip(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": np_tensor()}, cut=700))


@case("an old torch pickle cut short", 1, "pytorch_model.bin: storage", "truncated", "Download the file again")
def truncated_legacy(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": np_tensor()}, cut=700, is_zip=False))


@case(
    "a whole model object, not its state_dict", 1, "pytorch_model.bin: contains code (torch.nn.modules.linear.Linear)"
)
def pickled_module(room: Room) -> Arguments:
    import torch

    return _with_pickle(room, _torch_save(torch.nn.Linear(2, 2)))


@case("a .bin file that is no torch file", 1, "pytorch_model.bin: is not a torch checkpoint")
def not_a_torch_file(room: Room) -> Arguments:
    return _with_pickle(room, lambda path: path.write_bytes(b"hello, world"))


@case("a tensor called __metadata__", 1, "pytorch_model.bin: __metadata__", "Rename the tensor")
def tensor_called_metadata(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"__metadata__": np_tensor()}))


def np_tensor() -> Any:
    import torch

    return torch.arange(1024.0)
