"""Loads a model into memory: a directory, hub id, model+adapter, or adapter alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.checkpoint.files import BOTTLENECK_CONFIG, FINETUNE_RECORD, read_json
from merge.checkpoint.hub import locate
from merge.errors import CheckpointError, UsageError
from merge.loading import CAUSAL, check_needs, load_adapter, load_config, load_model, load_tokenizer
from merge.loading.libraries import keep_4_bit_layout, quiet_libraries
from merge.recipe.references import parse_reference

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from merge.recipe.model import ModelRef


@dataclass(frozen=True)
class OpenedModel:
    name: str
    network: Module
    tokenizer: PreTrainedTokenizerBase


def load(text: str, kind: str = CAUSAL) -> OpenedModel:
    """A directory, hub id, `model+adapter`, or the directory of an adapter that names its base.

    Raises:
        UsageError: not a model's name, or a package is missing.
        CheckpointError: it cannot be loaded.
    """
    try:
        ref = parse_reference(text)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    adapter = None if ref.adapter is None else _adapter_path(ref.adapter)
    if adapter is None and (config := _adapter_config(ref.path)) is not None:
        adapter = ref.path
        try:
            ref = parse_reference(_base_of(config))
        except ValueError as error:
            raise CheckpointError(f"{config}: base_model_name_or_path: {error}.") from None
    path = locate(ref).path
    check_needs(path, adapter)
    with quiet_libraries():
        return _load(text, path, adapter, kind)


def _load(text: str, path: str, adapter: str | None, kind: str) -> OpenedModel:
    tokenizer = load_tokenizer(_tokenizer_path(adapter, path))
    config = load_config(path)
    labels = () if adapter is None else _labels(adapter)
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    network = load_model(kind, path, config=config, brought=_saved_with(adapter), dtype="auto").network
    keep_4_bit_layout(network, trained=False)
    if adapter is not None:
        network = _put(network, adapter, len(tokenizer))
    return OpenedModel(text, network.eval(), tokenizer)


def _put(network: Module, adapter: str, n_tokens: int) -> Module:
    """The network with the adapter, its embeddings enlarged for the adapter's new tokens."""
    if n_tokens > network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(n_tokens, mean_resizing=False)
    if os.path.isfile(os.path.join(adapter, BOTTLENECK_CONFIG)):
        from merge.loading.bottleneck import load_bottlenecks  # imports torch, and needs are checked first

        return load_bottlenecks(network, adapter)
    return load_adapter(network, adapter)


def _labels(adapter: str) -> tuple[str, ...]:
    """The labels that an adapter was trained on, from its record, as it has no config.json; () if not recorded."""
    file = os.path.join(adapter, FINETUNE_RECORD)
    return tuple(read_json(file, unique=False).get("labels") or ()) if os.path.isfile(file) else ()


def _saved_with(adapter: str | None) -> set[str]:
    """The parameters of the base that an adapter contains: its head."""
    from safetensors import safe_open

    found: set[str] = set()
    for name in ("adapter_model.safetensors", "bottleneck.safetensors"):
        if adapter is not None and os.path.isfile(file := os.path.join(adapter, name)):
            with safe_open(file, "np") as weights:
                found |= {key.removeprefix("base_model.model.") for key in weights.keys()}  # noqa: SIM118
    return found


def _adapter_config(folder: str) -> str | None:
    """The config file by which a directory is an adapter."""
    files = (os.path.join(folder, name) for name in ("adapter_config.json", BOTTLENECK_CONFIG))
    return next((file for file in files if os.path.isfile(file)), None)


def _adapter_path(ref: ModelRef) -> str:
    path = ref.path if os.path.isdir(ref.path) else locate(ref).path
    if _adapter_config(path) is None:
        raise CheckpointError(f"{path}: has no adapter_config.json, so it is not an adapter.")
    return str(path)


def _base_of(config: str) -> str:
    base = read_json(config, unique=False).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{config}: names no base model. Write MODEL+{os.path.dirname(config)}.")
    return base


def _tokenizer_path(adapter: str | None, model: str) -> str:
    """The adapter's tokenizer, if it has one: it may have new tokens."""
    return adapter if adapter and os.path.isfile(os.path.join(adapter, "tokenizer_config.json")) else model
