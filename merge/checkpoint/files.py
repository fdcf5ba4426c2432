"""Small JSON files of a model directory, and paths that never leave it."""

from __future__ import annotations

import os
import re
from pathlib import PureWindowsPath
from typing import Any

from merge.errors import CheckpointError
from merge.jsontext import parse_json

MAX_JSON_BYTES = 100_000_000
ADAPTER_CONFIG = "adapter_config.json"
BOTTLENECK_CONFIG = "bottleneck_config.json"  # beside the weights of bottleneck adapters
FINETUNE_RECORD = "finetune_manifest.json"  # written by merge finetune beside the weights


def inside(directory: str, name: str) -> str:
    """The path of `name` in `directory`, which need not exist.

    Links may lead to other files of the directory and to files of a hub cache, where a snapshot's own links lead, and
    those that older versions of huggingface_hub put into a `local_dir`; nowhere else.

    Raises:
        CheckpointError: the name is absolute or climbs with "..", or a symbolic link leads out of the directory.
    """
    windows = PureWindowsPath(name)
    if not name or "\0" in name or os.path.isabs(name) or windows.drive or windows.root:
        raise CheckpointError(
            f'{directory}: names the file "{name}", which is not a path inside the directory. '
            "Use plain file names only; do not trust this checkpoint if it came from elsewhere."
        )
    if ".." in re.split(r"[\\/]", name):
        raise CheckpointError(
            f'{directory}: names the file "{name}", which climbs out of the directory. '
            "Use plain file names only; do not trust this checkpoint if it came from elsewhere."
        )
    path = os.path.join(directory, name)
    real, root = os.path.realpath(path), os.path.realpath(directory)
    if _within(real, root) or (_in_hub_cache(real) and os.path.isfile(real)):
        return path
    raise CheckpointError(
        f"{path}: is a symbolic link to {real}, which is outside the model's directory. Copy the "
        "file into the directory, or name the directory that contains it."
    )


def weight_file(directory: str, name: str) -> str:
    """The path of an existing weight file."""
    path = inside(directory, name)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: is not a file, or links to a file that is not there. Download it again.")
    return path


def read_json(path: str, unique: bool = True) -> dict[str, Any]:
    """Reads a small JSON file of a model as an object; `unique`: duplicate names are an error.

    Raises:
        CheckpointError: not readable, not JSON, or beyond the bounds of merge.jsontext.
    """
    data = read_json_value(path, unique)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: holds a {type(data).__name__}, expected a JSON object. Download the file again."
        )
    return data


def read_json_value(path: str, unique: bool = True) -> Any:
    """Like read_json, for any JSON value."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            size = os.path.getsize(path)
            raise CheckpointError(f"{path}: {size:,} bytes; a JSON file of a model has at most {MAX_JSON_BYTES:,}.")
        data = parse_json(raw, unique=unique, is_text=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}. Download the file again.") from None
    return data


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _in_hub_cache(path: str) -> bool:
    """Whether a file is a content file of a hub cache.

    That is CACHE/models--org--name/blobs/ETAG, or CACHE/blobs/.., where huggingface_hub 2 keeps contents that several
    models share.
    """
    place = path
    while (parent := os.path.dirname(place)) != place:
        if os.path.basename(place) == "blobs":
            return os.path.basename(parent).startswith("models--") or any(
                name.startswith("models--") for name in os.listdir(parent)
            )
        place = parent
    return False
