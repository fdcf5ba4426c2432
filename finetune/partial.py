"""Partial training: chooses parameters by layer, or by regular expressions on their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from finetune.keys import Config
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


def choose_parameters(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    """train_only and train_last choose, freeze_first and freeze take away."""
    parameters = dict(model.named_parameters())
    chosen = dict.fromkeys(parameters, not (config.train_only or config.train_last))
    for pattern in config.train_only:
        chosen |= dict.fromkeys(_matching(pattern, "train_only", parameters), True)
    if config.train_last or config.freeze_first:
        chosen |= _by_layer(model, parameters, config)
    for pattern in config.freeze:
        chosen |= dict.fromkeys(_matching(pattern, "freeze", parameters), False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(chosen[name])
    return model


def layer_stack(model: Module) -> tuple[str, int]:
    """(name, length) of the list of layers: the module list with the most parameters."""
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UsageError("the model has no list of layers to count; use freeze or train_only with regular expressions.")
    name, layers = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return name, len(layers)


def _by_layer(model: Module, parameters: dict[str, Parameter], config: Config) -> dict[str, bool]:
    stack, n_layers = layer_stack(model)
    for name in ("freeze_first", "train_last"):
        if (getattr(config, name) or 0) > n_layers:
            raise UsageError(f"{name}: {getattr(config, name)}, and the model has {n_layers} layers.")
    inside = re.compile(re.escape(stack) + r"\.(\d+)\.")
    order = list(parameters)
    first = next(i for i, name in enumerate(order) if inside.match(name))
    chosen = {}
    for i, name in enumerate(order):
        match = inside.match(name)
        layer = int(match[1]) if match else (-1 if i < first else n_layers)  # before the stack, or after it
        if config.train_last and layer >= n_layers - config.train_last:
            chosen[name] = True
        if config.freeze_first and layer < config.freeze_first:
            chosen[name] = False
    return chosen


def _matching(pattern: str, key: str, names: Iterable[str]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f'{key}: "{pattern}" is not a regular expression ({error}).') from None
    found = [name for name in names if expression.search(name)]
    if not found:
        raise UsageError(f'{key}: no parameter matches "{pattern}"; one is called "{next(iter(names))}".')
    return found
