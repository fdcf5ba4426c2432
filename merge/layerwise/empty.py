"""Builds models without weights, or with all of them in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from merge.loading import CAUSAL, check_causal, check_sees_no_later, load_config, load_model, model_from_config

if TYPE_CHECKING:
    from torch.nn import Module


def empty_model(path: str) -> Module:
    """The model of a directory's config.json; parameters have a shape and no memory, buffers their values.

    Raises:
        CheckpointError: transformers does not know the architecture, or it is not a causal language model.
    """
    import torch

    config = load_config(path)
    check_causal(config, path)
    with _parameters_on_meta():
        # Experts one after another: transformers' other implementations need all their weights at once.
        return model_from_config(CAUSAL, config, path, dtype=torch.float32, experts_implementation="eager").eval()


def whole_model(path: str) -> Module:
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
    """Like the meta device, but buffers that no checkpoint holds, such as rotary frequencies, get their values."""
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: Module, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register
