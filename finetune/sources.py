"""Watches the files that training reads: they must not change during a run, nor between a kill and its resumption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merge.checkpoint.digest import file_digest
from merge.checkpoint.side_files import is_side_file
from merge.checkpoint.unchanged import check_unchanged
from merge.errors import CheckpointError, SourceChanged
from merge.plan import SourceFile

SourceStates = tuple[
    tuple[str, SourceFile], ...
]  # (name, state at reading); names stay the same when everything is moved


def model_sources(text: str, path: str) -> SourceStates:
    """The files of a model, or of an adapter, that the config calls `text`, as they are now."""
    files = {*weight_files(path), *(file for file in Path(path).iterdir() if _is_read(file.name) and file.is_file())}
    return tuple((f"{text}/{file.name}", SourceFile.now(file)) for file in sorted(files))


def _is_read(name: str) -> bool:
    return is_side_file(name) or name in ("config.json", "adapter_config.json") or name.endswith(".py")


def weight_files(path: str) -> list[Path]:
    """The files that hold weights, sorted by name."""
    files = (file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin"))
    return sorted(file for file in files if file.name != "training_args.bin")


def weight_digests(path: str) -> dict[str, str]:
    """File name -> xxh3-128 of a model's weight files. Raises CheckpointError if there are none."""
    digests = {file.name: file_digest(file) for file in weight_files(path)}
    if not digests:
        raise CheckpointError(f"{path}: there are no weights (.safetensors or .bin) beside config.json.")
    return digests


def check_sources(sources: SourceStates, digests: Mapping[str, str] | None = None) -> None:
    """Raises SourceChanged if a file is not what it was when it was read.

    digests: of the contents, by name; a file that was written again with the same ones still is what it was.
    """
    for name, file in sources:
        try:
            check_unchanged(file)
        except SourceChanged:
            if digests is None or not Path(file.path).is_file() or file_digest(file.path) != digests.get(name):
                raise


def source_digests(sources: SourceStates, known: Mapping[str, str]) -> dict[str, str]:
    """A digest of the contents of each, by name; xxh3-128, or what is `known`."""
    return {name: known.get(name) or file_digest(file.path) for name, file in sources} | dict(known)
