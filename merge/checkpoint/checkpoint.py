"""open_checkpoint: describes a model from its headers and config files; no tensor is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from merge.checkpoint.files import inside, read_json, weight_file
from merge.checkpoint.formats import decoded
from merge.checkpoint.hub import ModelPlace, locate
from merge.checkpoint.layout import find_weights
from merge.checkpoint.side_files import is_weights, list_side_files, module_folders, too_large
from merge.checkpoint.tensors import read_tensors
from merge.checkpoint.weight_file import read_file
from merge.errors import CheckpointError
from merge.plan import SourceFile, TensorRef
from merge.quoting import quoted, some
from merge.recipe.model import ModelRef


@dataclass(frozen=True)
class Checkpoint:
    """An input model.

    Attributes:
        ref: as the recipe names it.
        path: absolute path of its directory.
        revision: commit of a model from the hub; None for a local directory.
        config: config.json.
        tensors: name -> TensorRef, in the order of the files; quantised tensors are derived. Tensors of a module in its
            own folder (sentence-transformers) are called FOLDER/NAME.
        files: the weight files, as they were when their headers were read.
        notes: what was left out or chosen, for the user; without the model's name.
        adapter_path: directory of the adapter that is folded in.
        own_tokenizer: directory of its tokenizer, if not `path`.
    """

    ref: ModelRef
    path: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    files: tuple[SourceFile, ...]
    notes: tuple[str, ...]
    adapter_path: str | None = None
    own_tokenizer: str | None = None

    @property
    def tokenizer_path(self) -> str:
        """Directory of its tokenizer."""
        return self.own_tokenizer or self.path

    def side_files(self) -> tuple[str, ...]:
        """Names, relative to `path`, of the small files that belong to the weights."""
        return list_side_files(self.path)


def open_checkpoint(ref: ModelRef) -> Checkpoint:
    """Reads headers and config of a model; no tensor byte is read.

    Raises:
        CheckpointError: the model is missing, damaged or of a kind that cannot be read exactly.
    """
    if ref.adapter is not None:
        raise CheckpointError(
            f'{ref.text}: an adapter ("+") is not a checkpoint. Fold it first (merge lora fold), and name the result.'
        )
    place = locate(ref)
    files, tensors, notes = _weights(place)
    config = _read_config(place.path)
    tensors, format_notes = decoded(place.path, config, tensors)
    for folder in module_folders(place.path):
        inner = os.path.join(place.path, folder)
        if not any(is_weights(name) for name in os.listdir(inner)):
            continue
        module = find_weights(inner)
        files += tuple(SourceFile.now(weight_file(inner, name)) for name in module.files)
        found, module_notes = read_tensors(inner, module)
        tensors |= {f"{folder}/{name}": ref for name, ref in found.items()}
        notes += (*(f"{folder}: {note}" for note in module.notes), *module_notes)
    return Checkpoint(
        ref=ref,
        path=place.path,
        revision=place.revision,
        config=config,
        tensors=tensors,
        files=files,
        notes=(*place.notes, *notes, *format_notes, *_left_out(place.path)),
    )


def _weights(place: ModelPlace) -> tuple[tuple[SourceFile, ...], dict[str, TensorRef], tuple[str, ...]]:
    """Files, as they were before their headers were read, so that the engine notices a change; tensors; notes."""
    if place.weights is not None:
        file = SourceFile.now(place.weights)
        found, notes = read_file(place.weights)
        return (file,), {ref.name: ref for ref in found}, tuple(notes)
    weights = find_weights(place.path)
    files = tuple(SourceFile.now(weight_file(place.path, name)) for name in weights.files)
    tensors, more = read_tensors(place.path, weights)
    return files, tensors, (*weights.notes, *more)


def _left_out(directory: str) -> tuple[str, ...]:
    large = too_large(directory)
    return (f"not copied, because larger than side files are: {some(list(large))}",) if large else ()


def _read_config(directory: str) -> dict[str, object]:
    path = inside(directory, "config.json")
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{directory}: has weights but no config.json. Copy config.json from the model's page or its base model."
        )
    config = read_json(path, unique=False)  # as transformers reads it: the last one wins
    for key in ("text_config", "llm_config"):
        if not isinstance(config.get(key, {}), dict | None):
            raise CheckpointError(
                f"{path}: {key}: expected an object, found {quoted(config[key], 60)}. Download the file again."
            )
    return config
