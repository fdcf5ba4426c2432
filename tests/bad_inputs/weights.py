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

from bad_inputs.room import Arguments, Room, edit_header, read_parts, set_up, write_parts

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


@set_up
def truncated_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: os.truncate(b / WEIGHTS, (b / WEIGHTS).stat().st_size - 100))


@set_up
def truncated_header(room: Room) -> Arguments:
    return _with_b(room, lambda b: os.truncate(b / WEIGHTS, 64))


@set_up
def header_beyond_file(room: Room) -> Arguments:
    return _with_bytes(room, (4096).to_bytes(8, "little") + b"{}")


@set_up
def header_of_exabytes(room: Room) -> Arguments:
    return _with_bytes(room, (1 << 63).to_bytes(8, "little") + b"{}")


@set_up
def header_over_limit(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).write_bytes((100_000_001).to_bytes(8, "little") + b"{")
        os.truncate(b / WEIGHTS, 100_000_100)  # sparse

    return _with_b(room, change)


@set_up
def header_not_json(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b'{"a": [1, 2', b""))


@set_up
def header_not_text(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b"{\xff\xfe}", b""))


@set_up
def header_nested(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b'{"a":' * 100_000, b""))


@set_up
def header_list(room: Room) -> Arguments:
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, b"[]", b""))


@set_up
def overlapping_offsets(room: Room) -> Arguments:
    def change(header: dict[str, Any]) -> None:
        tensors = [name for name in header if name != "__metadata__"]
        sizes = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in tensors}
        one, other = [name for name in tensors if sizes[name] == sizes[Q]][:2]
        header[other]["data_offsets"] = header[one]["data_offsets"]

    return _with_header(room, change)


@set_up
def hole(room: Room) -> Arguments:
    def change(b: Path) -> None:
        header, data = read_parts(b / WEIGHTS)
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0]:
                entry["data_offsets"] = [place + 8 for place in entry["data_offsets"]]
        write_parts(b / WEIGHTS, header, data + bytes(8))

    return _with_b(room, change)


@set_up
def duplicate_names(room: Room) -> Arguments:
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return _with_b(room, lambda b: write_parts(b / WEIGHTS, f"{{{entry},{entry}}}".encode(), bytes(4)))


@set_up
def unknown_dtype(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(dtype="F33"))


@set_up
def packed_dtype(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(dtype="F4"))


@set_up
def shape_and_bytes(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=[9, 8]))


@set_up
def shape_overflows(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=[1 << 32, 1 << 32, 1 << 32]))


@set_up
def shape_of_text(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(shape=["8", 8]))


@set_up
def negative_offset(room: Room) -> Arguments:
    return _with_header(room, lambda header: header[Q].update(data_offsets=[-4, 0]))


@set_up
def trailing_bytes(room: Room) -> Arguments:
    def change(b: Path) -> None:
        header, data = read_parts(b / WEIGHTS)
        write_parts(b / WEIGHTS, header, data + bytes(7))

    return _with_b(room, change)


@set_up
def empty_weight_file(room: Room) -> Arguments:
    return _with_bytes(room, b"")


@set_up
def lfs_pointer(room: Room) -> Arguments:
    return _with_bytes(room, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n")


@set_up
def web_page(room: Room) -> Arguments:
    return _with_bytes(room, b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


@set_up
def weights_are_a_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        (b / WEIGHTS).mkdir()

    return _with_b(room, change)


@set_up
def weights_are_a_pipe(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        os.mkfifo(b / WEIGHTS)

    room.watch = False
    return _with_b(room, change)


# --- shards and indexes ------------------------------------------------------------------------------------------


@set_up
def index_names_missing_file(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "other.safetensors"}))


@set_up
def index_climbs_out(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "../x.safetensors"}))


@set_up
def index_names_absolute_path(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: "/etc/passwd"}))


@set_up
def index_lists_absent_tensor(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({"extra.weight": SHARD}))


@set_up
def index_lacks_tensor(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.pop(Q))


@set_up
def index_says_other_shard(room: Room) -> Arguments:
    return _with_index(room, lambda weights: weights.update({Q: SHARD}))


@set_up
def index_without_map(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / INDEX).write_text("{}"), shards=2)


@set_up
def index_not_json(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / INDEX).write_text('{"weight_map": '), shards=2)


@set_up
def absent_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / SHARD).unlink(), shards=2)


@set_up
def absent_shard_without_index(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / INDEX).unlink()
        (b / SHARD).unlink()

    return _with_b(room, change, shards=2)


@set_up
def empty_shard(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / SHARD).write_bytes(b""), shards=2)


@set_up
def tensor_in_two_shards(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / INDEX).unlink()
        shutil.copy(b / "model-00001-of-00002.safetensors", b / SHARD)

    return _with_b(room, change, shards=2)


@set_up
def two_files_without_index(room: Room) -> Arguments:
    def change(b: Path) -> None:
        shutil.copy(b / WEIGHTS, b / "x.safetensors")
        (b / WEIGHTS).rename(b / "y.safetensors")

    return _with_b(room, change)


@set_up
def link_out_of_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).unlink()
        (b / WEIGHTS).symlink_to("../a/model.safetensors")

    return _with_b(room, change)


@set_up
def tokenizer_links_out(room: Room) -> Arguments:
    arguments = room.pair_and_recipe()
    (room.path / "a" / "tokenizer.json").unlink()
    (room.path / "a" / "tokenizer.json").symlink_to("/etc/hostname")
    return arguments


# --- directories -------------------------------------------------------------------------------------------------


@set_up
def empty_directory(room: Room) -> Arguments:
    room.model("a")
    (room.path / "b").mkdir()
    return room.recipe()


@set_up
def directory_without_weights(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).unlink())


@set_up
def adapter_directory(room: Room) -> Arguments:
    def change(b: Path) -> None:
        (b / WEIGHTS).rename(b / "adapter_model.safetensors")
        (b / "adapter_config.json").write_text("{}")

    return _with_b(room, change)


@set_up
def gguf_directory(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).rename(b / "q4.gguf"))


@set_up
def publishers_format(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / WEIGHTS).rename(b / "consolidated.00.pth"))


@set_up
def no_config(room: Room) -> Arguments:
    return _with_b(room, lambda b: (b / "config.json").unlink())


@set_up
def broken_config(room: Room) -> Arguments:
    return _with_bytes(room, b"{broken", "config.json")


@set_up
def config_is_a_list(room: Room) -> Arguments:
    return _with_bytes(room, b"[]", "config.json")


@set_up
def nested_config(room: Room) -> Arguments:
    return _with_bytes(room, b'{"a":' * 800 + b"1" + b"}" * 800, "config.json")


@set_up
def half_a_character(room: Room) -> Arguments:
    return _with_bytes(room, rb'{"model_type": "\ud800"}', "config.json")


@set_up
def text_config_is_text(room: Room) -> Arguments:
    return _with_bytes(room, b'{"text_config": "llama"}', "config.json")


@set_up
def gptq(room: Room) -> Arguments:
    room.model("a")
    room.model("b", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    return room.recipe()


@set_up
def awq(room: Room) -> Arguments:
    room.model("a")
    room.model("b", config={"quantization_config": {"quant_method": "awq"}})
    return room.recipe()


@set_up
def fp8_without_scales(room: Room) -> Arguments:
    room.model("a")
    codes = {Q: (np.full((8, 8), 0x38, np.uint8), "float8_e4m3fn")}
    room.model("b", edit=lambda t: t.update(codes), config={"quantization_config": {"quant_method": "fp8"}})
    return room.recipe()


@set_up
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


@set_up
def pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": Payload()}))


@set_up
def legacy_pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": Payload()}, is_zip=False))


@set_up
def plain_pickle_with_code(room: Room) -> Arguments:
    return _with_pickle(room, lambda path: path.write_bytes(pickle.dumps(Payload())))


@set_up
def truncated_zip(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": np_tensor()}, cut=700))


@set_up
def truncated_legacy(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"a": np_tensor()}, cut=700, is_zip=False))


@set_up
def pickled_module(room: Room) -> Arguments:
    import torch

    return _with_pickle(room, _torch_save(torch.nn.Linear(2, 2)))


@set_up
def not_a_torch_file(room: Room) -> Arguments:
    return _with_pickle(room, lambda path: path.write_bytes(b"hello, world"))


@set_up
def tensor_called_metadata(room: Room) -> Arguments:
    return _with_pickle(room, _torch_save({"__metadata__": np_tensor()}))


def np_tensor() -> Any:
    import torch

    return torch.arange(1024.0)
