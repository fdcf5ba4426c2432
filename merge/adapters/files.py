"""open_adapter: describes an adapter from its config and headers; no tensor is read.

Layout: adapter_config.json and adapter_model.safetensors (or .bin), as PEFT 0.21 saves them; its names are
`base_model.model.MODULE.lora_A.weight` and the like. Whatever cannot be folded or combined exactly is refused by name:
no tensor of the file and no setting of the config is ignored.

Source: peft 0.21.2, utils/save_and_load.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge.adapters.config import check_config
from merge.adapters.parts import LoraModule, OtherModule, ParameterFactors, TokenRows
from merge.adapters.tensors import sort_tensors
from merge.checkpoint.files import ADAPTER_CONFIG, inside, read_json, weight_file
from merge.checkpoint.hub import locate
from merge.checkpoint.layout import stands_alone
from merge.checkpoint.side_files import list_side_files
from merge.checkpoint.weight_file import read_file
from merge.errors import CheckpointError
from merge.plan import SourceFile, TensorRef
from merge.recipe.model import ModelRef

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        ref: as the recipe names it.
        path: absolute path of its directory.
        revision: commit of an adapter from the hub.
        config: adapter_config.json.
        files: the weight file, as it was when its header was read.
        modules: base module name -> its change, in the file's order.
        parameters: name in the file -> the factors of a parameter that is not a module's weight.
        others: base module name -> its tensors, in an adapter of another kind than LoRA.
        saved: base tensor name -> the tensor that takes its place (modules_to_save, trained biases, saved embeddings).
        tokens: base tensor name -> rows of it that are replaced.
        notes: what was left out or chosen, for the user to know.
    """

    ref: ModelRef
    path: str
    revision: str | None
    config: dict[str, Any]
    files: tuple[SourceFile, ...]
    modules: Mapping[str, LoraModule]
    saved: Mapping[str, TensorRef]
    tokens: Mapping[str, TokenRows]
    notes: tuple[str, ...] = ()
    parameters: Mapping[str, ParameterFactors] = field(default_factory=dict)
    others: Mapping[str, OtherModule] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """PEFT's name of the kind, e.g. "LORA"."""
        return str(self.config["peft_type"])

    @property
    def base_name(self) -> str | None:
        """The base model that the config names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def side_files(self) -> tuple[str, ...]:
        """Names, relative to `path`, of the adapter's own tokenizer and template files."""
        return list_side_files(self.path)


def is_adapter(directory: str) -> bool:
    """Whether a local directory holds an adapter and no whole model."""
    return os.path.isfile(os.path.join(directory, ADAPTER_CONFIG)) and not os.path.isfile(
        os.path.join(directory, "config.json")
    )


def refuse_alone(directory: str) -> None:
    """Raises CheckpointError for an adapter without a base where a whole model is expected."""
    if is_adapter(directory):
        raise stands_alone(directory)


def open_adapter(ref: ModelRef) -> Adapter:
    """Reads config and header of an adapter; no tensor byte is read.

    Raises:
        CheckpointError: the adapter is missing, damaged, or cannot be folded exactly.
    """
    place = locate(ref, adapter=True)
    config_path = inside(place.path, ADAPTER_CONFIG)
    if not os.path.isfile(config_path):
        raise CheckpointError(
            f"{place.path}: is not an adapter: it has no {ADAPTER_CONFIG}. "
            "Name a directory that PEFT's save_pretrained wrote."
        )
    config = read_json(config_path, unique=False)
    check_config(config_path, config)
    path, file_notes = _weights(place.path)
    file = SourceFile.now(path)
    refs, notes = read_file(path)
    found = sort_tensors(config_path, path, config, refs)
    if not (found.modules or found.parameters or found.others or found.saved or found.tokens):
        raise CheckpointError(f"{path}: holds no tensors. Train the adapter, or download it again.")
    return Adapter(
        ref=ref,
        path=place.path,
        revision=place.revision,
        config=config,
        files=(file,),
        modules=found.modules,
        saved=found.saved,
        tokens=found.tokens,
        notes=(*(f"{ref.text}: {note}" for note in place.notes), *file_notes, *notes, *found.notes),
        parameters=found.parameters,
        others=found.others,
    )


def _weights(directory: str) -> tuple[str, tuple[str, ...]]:
    found = [name for name in WEIGHTS if os.path.lexists(os.path.join(directory, name))]
    if not found:
        raise CheckpointError(
            f"{directory}: has {ADAPTER_CONFIG} but none of {', '.join(WEIGHTS)}. Download the adapter's weights again."
        )
    note = (f"{directory}: has {found[0]} and {found[1]}; {found[0]} is read",) if len(found) > 1 else ()
    return weight_file(directory, found[0]), note
