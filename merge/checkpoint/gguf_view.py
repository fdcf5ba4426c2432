"""view_of: what goes with the weights of a GGUF file, as a directory like any model's: config.json and the tokenizer.

It lies in the user's cache and is made of the file's metadata once for each state of the file, so that recipes,
tokenizers and side files need not know where a model comes from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.checkpoint.gguf_header import GgufHeader, read_gguf_header
from merge.checkpoint.gguf_tokenizer import tokenizer_files
from merge.errors import CheckpointError
from merge.gguf_layouts import config_of, family_named
from merge.gguf_layouts.llama import scaling_of
from merge.quoting import quoted
from merge.user_cache import user_cache

_FORMAT = 2  # of what is written here
_MOST_DIVISORS = 4096


def view_of(path: str) -> str:
    """The directory that stands for a GGUF file.

    Raises:
        CheckpointError: the file is damaged or incomplete, or the cache cannot be written.
        UsageError: an architecture or tokenizer that is not known.
    """
    info = os.stat(path)
    state = f"{_FORMAT} {path} {info.st_size} {info.st_mtime_ns}".encode("utf-8", "surrogateescape")
    root = user_cache() / "gguf"
    directory = root / hashlib.sha256(state).hexdigest()[:32]
    if not directory.is_dir():
        header = read_gguf_header(path)
        try:
            _write(directory, _files(path, header))
        except OSError as error:
            raise CheckpointError(
                f"{root}: cannot be written ({error.strerror or error}); the config and tokenizer of {path} go there. "
                "Set XDG_CACHE_HOME to another directory."
            ) from error
    return str(directory)


def _write(directory: Path, files: Mapping[str, str]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        os.rename(new, directory)
    except OSError:
        if not directory.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _files(path: str, header: GgufHeader) -> dict[str, str]:
    arch = str(header.metadata.get("general.architecture"))
    if header.metadata.get("split.count", 0) > 1:
        raise CheckpointError(f"{path}: is one part of a split file. Join the parts with llama-gguf-split --merge.")
    family = family_named(arch, path)
    metadata = {key.removeprefix(f"{arch}."): value for key, value in header.metadata.items()}
    names = {entry.name for entry in header.tensors}
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is missing. Name the original model.")
    try:
        config = config_of(metadata, len(tokens), "output.weight" not in names) | family.config(metadata)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: metadata of {arch}: {quoted(str(error))} is missing or wrong.") from None
    if (divisors := _divisors(path, header)) is not None:
        scaling = scaling_of(config, divisors)
        if scaling is None:
            raise CheckpointError(f"{path}: rope_freqs.weight: not a scaling of Llama 3.1. Name the original model.")
        config["rope_parameters"] |= scaling
    for name in ("bos", "eos", "pad"):
        number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            config[f"{name}_token_id"] = number
    return {"config.json": _json(config), **tokenizer_files(path, header.metadata)}


def _divisors(path: str, header: GgufHeader) -> list[float] | None:
    """Of the rotary frequencies; None if the file has none."""
    entry = next((entry for entry in header.tensors if entry.name == "rope_freqs.weight"), None)
    if entry is None:
        return None
    n = min(math.prod(entry.shape), _MOST_DIVISORS)
    with open(path, "rb") as file:
        file.seek(entry.offset)
        data = file.read(4 * n)
    return list(struct.unpack(f"<{len(data) // 4}f", data[: len(data) // 4 * 4]))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
