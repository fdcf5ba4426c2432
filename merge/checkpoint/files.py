"""Small files of a model directory, and paths that never leave it."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import PureWindowsPath
from typing import Any

from merge.errors import CheckpointError
from merge.jsontext import parse_json

MAX_JSON_BYTES = 100_000_000

# Files that go with the weights into an output. *.py is not among them: remote code is not copied unasked.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def is_side_file(name: str) -> bool:
    return not name.endswith(".py") and any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in SIDE_FILES
    )


def list_side_files(directory: str) -> tuple[str, ...]:
    """Names of the side files that are there, in the order of SIDE_FILES.

    Raises:
        CheckpointError: one of them is a link that leaves the directory.
    """
    found: list[str] = []
    for pattern in SIDE_FILES:
        folder, _, _ = pattern.rpartition("/")
        if not folder:
            found.extend([pattern] if os.path.lexists(os.path.join(directory, pattern)) else [])
        elif os.path.isdir(os.path.join(directory, folder)):
            names = sorted(os.listdir(os.path.join(directory, folder)))
            found.extend(f"{folder}/{name}" for name in names if is_side_file(f"{folder}/{name}"))
    return tuple(name for name in found if os.path.isfile(inside(directory, name)))


def inside(directory: str, name: str) -> str:
    """The path of `name` in `directory`, which need not exist.

    Links may lead to other files of the directory and, where the directory is a snapshot in the hub's cache, to that
    cache's blobs; nowhere else.

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
    if any(_within(real, place) for place in (root, *_hub_blobs(root))):
        return path
    raise CheckpointError(
        f"{path}: is a symbolic link to {real}, which lies outside the model's directory. "
        "Copy the file into the directory, or name the directory where it lies."
    )


def weight_file(directory: str, name: str) -> str:
    """The path of a weight file, which is there."""
    path = inside(directory, name)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: is not a file, or links to a file that is not there. Download it again.")
    return path


def read_json(path: str, unique: bool = True) -> dict[str, Any]:
    """A small JSON file of a model that holds an object; `unique`: a name that is there twice is an error.

    Raises:
        CheckpointError: not readable, not JSON, or beyond the bounds of merge.jsontext.
    """
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
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: holds a {type(data).__name__}, expected a JSON object. Download the file again."
        )
    return data


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _hub_blobs(root: str) -> tuple[str, ...]:
    """Folders that hold the contents of a snapshot in the hub's cache; () for any other directory.

    CACHE/models--org--name/snapshots/COMMIT/file -> ../../blobs/ETAG, which may itself be a link into CACHE/blobs,
    where huggingface_hub 2 keeps contents that several models share.
    """
    place = root
    while (parent := os.path.dirname(place)) != place:
        repository = os.path.dirname(parent)
        if os.path.basename(parent) == "snapshots" and os.path.basename(repository).startswith("models--"):
            folders = (os.path.join(repository, "blobs"), os.path.join(os.path.dirname(repository), "blobs"))
            return tuple(os.path.realpath(folder) for folder in folders)
        place = parent
    return ()
