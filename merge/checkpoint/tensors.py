"""Reads all weight files into one dictionary of tensors, and checks it against the index, if there is one."""

from __future__ import annotations

from merge.checkpoint.files import weight_file
from merge.checkpoint.layout import WeightFiles
from merge.checkpoint.weight_file import read_file
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import some


def read_tensors(directory: str, weights: WeightFiles) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Every tensor of the weight files, file by file, and notes.

    Raises:
        CheckpointError: a damaged file, a tensor in two files, or files and index that do not agree.
    """
    tensors: dict[str, TensorRef] = {}
    notes: list[str] = []
    for name in weights.files:
        path = weight_file(directory, name)
        found, file_notes = read_file(path)
        notes.extend(file_notes)
        for ref in found:
            if ref.name in tensors:
                raise CheckpointError(
                    f"{ref.name}: is in two files, {tensors[ref.name].file} and {path}. "
                    "Remove the file that does not belong to this checkpoint."
                )
            tensors[ref.name] = ref
    if weights.weight_map is not None:
        _agree(directory, weights, weights.weight_map, tensors)
    return tensors, tuple(notes)


def _agree(directory: str, weights: WeightFiles, weight_map: dict[str, str], tensors: dict[str, TensorRef]) -> None:
    paths = {name: weight_file(directory, name) for name in weights.files}
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{paths[weight_map[absent[0]]]}: {some(absent)}: listed in {weights.index} but not in the file. "
            "Index and shards are of different versions: download them all again."
        )
    for name, file in weight_map.items():
        if tensors[name].file != paths[file]:
            raise CheckpointError(
                f"{tensors[name].file}: {name}: is in this file, but {weights.index} says {file}. "
                "Index and shards are of different versions: download them all again."
            )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{tensors[unlisted[0]].file}: {some(unlisted)}: in the file but not listed in {weights.index}. If the "
            "file is right, remove the index (numbered shards are read without it) or add the tensor to it; else "
            "download both again."
        )
