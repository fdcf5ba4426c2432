"""Lays out the output before anything is computed: shards, their safetensors headers, byte offsets.

Names and index are those of the Hugging Face Hub. Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from merge.dtypes import DTYPES
from merge.plan import Shard, Step

INDEX = "model.safetensors.index.json"
_ALIGN = 8  # the header is padded so that tensors begin at a multiple of this


def lay_out(
    steps: Sequence[Step], shard_bytes: int, stem: str = "model", modules: Sequence[str] = ()
) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Gives every step its file and offset.

    Args:
        steps: in output order; `file` and `offset` are filled in.
        shard_bytes: most bytes of tensors in a shard; a larger tensor gets a shard of its own.
        stem: the beginning of the files' names.
        modules: folders; the tensors FOLDER/NAME are NAME in one file of their own there.
    """
    folders = {step.name: folder for folder in modules for step in steps if step.name.startswith(f"{folder}/")}
    placed, shards = _sharded([step for step in steps if step.name not in folders], shard_bytes, stem)
    for folder in modules:
        if own := [step for step in steps if folders.get(step.name) == folder]:
            more, files = _sharded(own, sum(step.nbytes for step in own), stem, f"{folder}/")
            placed, shards = placed + more, shards + files
    return placed, shards


def _sharded(
    steps: Sequence[Step], shard_bytes: int, stem: str, folder: str = ""
) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    groups: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if groups[-1] and filled + step.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(step)
        filled += step.nbytes
    placed: list[Step] = []
    shards = []
    for number, group in enumerate(groups, 1):
        part = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        file = f"{folder}{stem}{part}.safetensors"
        # Wider numbers first, so that every tensor is aligned to its own width.
        ordered = sorted(group, key=lambda step: -DTYPES[step.dtype].itemsize)
        header, offsets = _header(ordered, folder)
        start = 8 + len(header)
        shards.append(Shard(file, header, start + sum(step.nbytes for step in group)))
        placed += [step.at(file, start + offset) for step, offset in zip(ordered, offsets, strict=True)]
    return tuple(placed), tuple(shards)


def _header(steps: Sequence[Step], folder: str) -> tuple[str, list[int]]:
    """The header's JSON text (ASCII, padded with spaces) and each tensor's offset after it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = []
    offset = 0
    for step in steps:
        offsets.append(offset)
        entries[step.name.removeprefix(folder)] = {
            "dtype": step.dtype,
            "shape": list(step.shape),
            "data_offsets": [offset, offset + step.nbytes],
        }
        offset += step.nbytes
    text = json.dumps(entries, separators=(",", ":"))
    return text + " " * (-len(text) % _ALIGN), offsets


def index_text(steps: Sequence[Step], shards: Sequence[Shard]) -> str | None:
    """Text of the index file; None for a single shard, which has none. Modules in folders are not part of it."""
    if sum("/" not in shard.file for shard in shards) == 1:
        return None
    steps = [step for step in steps if "/" not in step.file]
    weight_map = {step.name: step.file for step in steps}
    total = sum(step.nbytes for step in steps)
    metadata = {"total_size": total, "total_parameters": sum(step.size for step in steps)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def header_text(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file of float32 tensors, and the byte of the file where each tensor begins."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    places, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        places[name] = offset
        offset += size
    text = json.dumps(entries, separators=(",", ":"))
    header = (text + " " * (-len(text) % _ALIGN)).encode("ascii")
    return header, {name: 8 + len(header) + place for name, place in places.items()}
