"""Checkpoint -> torch modules whose parameters are loaded when they are needed, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from merge.checkpoint import Checkpoint
from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.loading import (
    CAUSAL,
    check_causal,
    check_sees_no_later,
    check_stored,
    load_config,
    load_model,
    model_from_config,
)
from merge.plan import TensorRef

# Architectures whose decoder layers are a function of the hidden state and of what is the same for every layer or
# follows from the layer's number: no keys and values, embeddings or routing shared between layers.
LAYERWISE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo", "olmo2", "granite"),
    *("smollm3", "starcoder2", "stablelm", "cohere", "glm", "glm4", "gpt_neox"),
)


def empty_model_of(checkpoint: Checkpoint) -> Any:
    """empty_model() of a checkpoint. Raises CheckpointError: tensors are missing, or have no place in the model."""
    model = empty_model(checkpoint.path)
    check_stored(model, {name: ref.shape for name, ref in checkpoint.tensors.items()}, checkpoint.path)
    return model


def empty_model(path: str) -> Any:
    """The model of a directory's config.json; parameters have a shape and no memory, buffers their values.

    Raises:
        CheckpointError: transformers does not know the architecture, or it is no causal language model.
    """
    config = load_config(path)
    check_causal(config, path)
    with _parameters_on_meta():
        return model_from_config(CAUSAL, config, path).eval()


def whole_model(path: str) -> Any:
    """The model in memory, float32, as transformers loads it.

    Raises:
        CheckpointError: it cannot be loaded, or its predictions depend on later tokens.
    """
    import torch

    network = load_model(CAUSAL, path, dtype=torch.float32).network.eval()
    check_sees_no_later(network, path)
    return network


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """As the meta device, but buffers such as rotary frequencies, which no checkpoint holds, get their values."""
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register


class Loader:
    """Puts tensors of a checkpoint into modules of its empty model."""

    def __init__(self, model: Any, checkpoint: Checkpoint, reader: SourceReader) -> None:
        self.model, self._tensors, self._reader = model, checkpoint.tensors, reader

    def lacking(self) -> list[str]:
        """Parameters that the checkpoint does not store under the same name and shape; of tied ones, one is enough."""
        return [
            name
            for name, parameter in self.model.named_parameters()  # each once
            if name not in self._tensors or self._tensors[name].shape != tuple(parameter.shape)
        ]

    def load(self, names: Iterable[str]) -> None:
        """Parameters by name -> memory."""
        tensors = {name: self._read(self._tensors[name]) for name in names}
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Rows start..stop of a matrix, or of a vector its elements, float32."""
        ref = self._tensors[name]
        columns = ref.size // ref.shape[0]
        return self._values(ref, start * columns, (stop - start) * columns).view(stop - start, *ref.shape[1:])

    def _read(self, ref: TensorRef) -> Any:
        return self._values(ref, 0, ref.size).view(ref.shape)

    def _values(self, ref: TensorRef, start: int, count: int) -> Any:
        import torch

        raw = np.empty(count, DTYPES[ref.dtype].numpy_name)
        self._reader.read_into(ref, start, raw)
        if ref.dtype == "F64":
            values = raw.astype(np.float32)
        else:
            values = np.empty(count, np.float32)
            self._reader.decode(ref, raw, start, values)
        return torch.from_numpy(values)


def obstacle(model: Any, loader: Loader) -> str | None:
    """Why a model cannot be run layer by layer."""
    kind = model.config.model_type
    if kind not in LAYERWISE:
        return f'the architecture "{kind}" is not one that is known to run layer by layer'
    lacking = loader.lacking()
    if lacking:
        return f"its files do not have {lacking[0]} as transformers makes it ({len(lacking)} such tensors)"
    return None


@contextlib.contextmanager
def switched_off(layers: Sequence[Any], instead: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Layers that hand the hidden state on; those of `instead` are replaced by a function."""
    for number, layer in enumerate(layers):
        layer.forward = instead.get(number, lambda hidden, *_, **__: hidden)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
