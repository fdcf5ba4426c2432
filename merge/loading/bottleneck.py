"""Bottleneck adapters: a small two-layer network after the attention and after the MLP of every layer.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751), section 2.1:
y = f(x) + W_up g(W_down f(x) + b_down) + b_up, before the residual sum. Deviations: g is GELU; W_up and b_up start at
exactly zero (the paper: near zero), so that the model starts as the base; layer norms stay frozen.

An adapter is a submodule of the linear layer it follows, so the base's parameters keep their names. Saved are the
adapters, and a head that the base lacks: bottleneck.safetensors and bottleneck_config.json.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge.checkpoint.files import BOTTLENECK_CONFIG, read_json
from merge.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch.nn import Module

CONFIG, WEIGHTS = BOTTLENECK_CONFIG, "bottleneck.safetensors"
NAME = "bottleneck"
# Names of the last linear layer of attention and of the MLP: Llama and similar models, GPT-NeoX and Falcon,
# OPT, GPT-2, BERT.
TARGETS = (
    *("self_attn.o_proj", "mlp.down_proj", "attention.dense", "self_attention.dense", "mlp.dense_4h_to_h"),
    *("self_attn.out_proj", "fc2", "attn.c_proj", "mlp.c_proj", "attention.output.dense", "output.dense"),
)


class Bottleneck(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """(..., width) -> (..., width), the change to add; zero before it is trained."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.silent = False
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.up(nn.functional.gelu(self.down(x.to(self.down.weight.dtype))))
        return change.to(x.dtype)


def add_bottlenecks(model: Module, width: int, targets: tuple[str, ...] = ()) -> list[str]:
    """Freezes the model and puts an adapter of `width` after every module whose name ends with a target.

    Raises:
        UsageError: there is no such module.
    """
    names = targets or TARGETS
    found = {
        name: module
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in names) and hasattr(module, "weight")
    }
    if not found:
        raise UsageError(f"bottleneck: no module is named {' or '.join(names)}; name the model's with target_modules.")
    model.requires_grad_(False)
    for module in found.values():
        size = module.weight.shape[1] if type(module).__name__ == "Conv1D" else module.weight.shape[0]  # GPT-2's
        module.add_module(NAME, Bottleneck(size, width).to(module.weight.device))
        module.register_forward_hook(_add_change)
    model.bottleneck_config = {"width": width, "target_modules": list(names), "modules": list(found)}
    return list(found)


def _add_change(module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter = getattr(module, NAME)
    return output if adapter.silent else output + adapter(output)


@contextlib.contextmanager
def silent_bottlenecks(model: Module) -> Iterator[None]:
    """A context in which the model computes without its bottlenecks."""
    adapters = [module for module in model.modules() if isinstance(module, Bottleneck)]
    for adapter in adapters:
        adapter.silent = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.silent = False


def save_bottlenecks(model: Module, folder: Path, base: str, state: dict[str, Tensor] | None = None) -> None:
    """Writes the adapters of a model; `state`: its gathered parameters, where they are sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    new = getattr(model, "new_parameters", ())
    kept = {name: value for name, value in state.items() if f".{NAME}." in name or name in new}
    tensors = {name: value.detach().cpu().contiguous() for name, value in kept.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"base_model_name_or_path": base, **model.bottleneck_config}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_bottlenecks(model: Module, folder: str | Path) -> Module:
    """Adds the adapters of a folder to their base model.

    Raises:
        CheckpointError: no such adapter, or not for this model.
    """
    folder = Path(folder)
    try:
        config = read_json(str(folder / CONFIG), unique=False)
        width, targets, modules = int(config["width"]), tuple(config["target_modules"]), config["modules"]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a bottleneck adapter ({error}).") from None
    found = add_bottlenecks(model, width, targets)
    put_bottlenecks(model, tensors, folder)
    if found != modules:
        raise CheckpointError(f"{folder}: was trained on {len(modules)} modules, and this model has {len(found)}.")
    return model


def put_bottlenecks(model: Module, tensors: dict[str, Tensor], folder: Path) -> None:
    own = {name: value for name, value in model.state_dict().items() if f".{NAME}." in name or name in tensors}
    wrong = [
        name
        for name in {**own, **tensors}
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{folder / WEIGHTS}: {wrong[0]} does not fit this model. Load it into its own base.")
    model.load_state_dict(tensors, strict=False)
