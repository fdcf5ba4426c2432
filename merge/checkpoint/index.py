"""Reads the index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import os

from merge.checkpoint.files import inside, read_json
from merge.errors import CheckpointError
from merge.quoting import quoted, some

_MOST_MISSING = 1000  # files whose existence is checked; each takes a few system calls


def read_index(directory: str, name: str) -> dict[str, str]:
    """weight_map of an index: tensor -> file. Every file must lie inside the directory, and exist.

    Raises:
        CheckpointError: naming the index, the tensor and the file.
    """
    path = inside(directory, name)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: has no "weight_map" from tensors to files. Download the file again.')
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: {tensor}: expected the name of a file, found {quoted(file)}.")
    missing: list[str] = []
    for file in sorted(set(weight_map.values())):
        if len(missing) > _MOST_MISSING:
            break
        try:
            shard = inside(directory, file)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not os.path.isfile(shard):
            missing.append(file)
    if missing:
        what = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{path}: names {some(missing)}, which {what} not there. Download the missing files again."
        )
    return weight_map
