"""Counts what one forward pass or training step of a model allocates, on fake tensors without memory.

transformers' own code of the architecture runs on tensors that have a shape and no memory (torch's FakeTensorMode);
every operation's result is counted when it is made and when it dies. So activations are those that autograd keeps for
this architecture, attention kernel and dtype, and not a formula for Llama. The kernels are the processor's, whose
attention keeps no matrix of scores, as flash attention on a GPU does not.

What it cannot know: the allocator's fragmentation and the workspace of libraries.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import UsageError, first_line
from merge.loading import model_from_config, own_class
from merge.tools.memory_math import lora_shapes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Trace:
    """Bytes of tensors.

    Attributes:
        weights: parameters and buffers, adapters included, before the step.
        peak: the most at any time of the step, weights included, optimizer states not.
        after: what is left after it: of training weights and gradients; of inference weights, cache and logits.
        trainable: shapes of the parameters that have a gradient.
        trainable_bytes, largest: bytes of all of them, and of the largest one.
    """

    weights: int
    peak: int
    after: int
    trainable: dict[str, tuple[int, ...]]
    trainable_bytes: int
    largest: int


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)


def parameter_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters, tied ones once; nothing is allocated."""
    import torch

    with torch.device("meta"):
        model = build_model(config, "bfloat16")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def trace_inference(
    config: PreTrainedConfig, *, dtype: str, batch: int, context: int, all_logits: bool = False
) -> Trace:
    """Reading a prompt of `context` tokens into the key-value cache.

    Args:
        dtype: torch name of the weights' dtype.
        all_logits: logits of every token, as for perplexity, instead of the last token's, as for generation.
    """
    import torch

    with _counting() as counter, torch.no_grad():
        model = build_model(config, dtype).eval()
        weights = counter.start()
        tokens = torch.zeros(batch, context, dtype=torch.long)
        generative = "labels" in _arguments(model) and "logits_to_keep" in _arguments(model)
        extra = {} if all_logits or not generative else {"logits_to_keep": 1}
        if "use_cache" in _arguments(model):
            extra["use_cache"] = not all_logits
        output = model(input_ids=tokens, **extra)
        trace = Trace(weights, counter.peak, counter.live, {}, 0, 0)
        del output
    return trace


def trace_training(
    config: PreTrainedConfig,
    *,
    dtype: str,
    batch: int,
    context: int,
    lora: Lora | None = None,
    checkpointing: bool = False,
    mixed: bool = False,
) -> Trace:
    """Forward and backward of one batch of full sequences, with the loss that the model computes from labels.

    Args:
        lora: train adapters only; None: train all.
        checkpointing: keep the inputs of layers only, and compute the rest again (Chen et al., arXiv:1604.06174).
        mixed: compute in bfloat16 from float32 weights, with the copies that autocast keeps.

    Raises:
        UsageError: a target names no layer, or the architecture has no checkpointing.
    """
    import torch

    with _counting() as counter:
        model = build_model(config, dtype).train()
        if checkpointing:
            model.config.use_cache = False  # as transformers does itself then, with a warning
            with _explained("--checkpointing"):
                # False: dropout's random state is a real tensor, which fake ones cannot be made of
                kept = {"use_reentrant": False, "preserve_rng_state": False}
                if hasattr(model, "activation_checkpointing_enable"):
                    model.activation_checkpointing_enable(kept)
                else:  # its name before transformers 5.20
                    model.gradient_checkpointing_enable(kept)
        if lora is not None:
            if checkpointing:
                model.enable_input_require_grads()
            model = _with_adapters(model, lora).train()
        weights = counter.start()
        tokens = torch.zeros(batch, context, dtype=torch.long)
        labels = tokens if "logits_to_keep" in _arguments(model) or lora else torch.zeros(batch, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = model(input_ids=tokens, labels=labels)
        output.loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        sizes = [parameter.nbytes for parameter in trained.values()]
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        del output
        trace = Trace(weights, counter.peak, counter.live, shapes, sum(sizes), max(sizes))
        del model, trained, labels, tokens
    return trace


def _arguments(model: Module) -> Sequence[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


def build_model(config: PreTrainedConfig, dtype: str) -> Module:
    """The class that config.json names, else a causal language model, with parameters of a dtype."""
    import torch

    config = copy.deepcopy(config)  # making a model writes its dtype into it
    return model_from_config(own_class(config), config, config.name_or_path, dtype=getattr(torch, dtype))


def _with_adapters(model: Module, lora: Lora) -> Module:
    """LoRA as peft lays it beside linear layers: float32 factors, the input in float32 for them, one more addition.

    Not by peft itself: it moves its parameters between devices, which fake ones do not support.
    """
    import torch
    from torch import nn

    class Adapted(nn.Module):  # type: ignore[misc]  # torch is not followed
        def __init__(self, base: Module) -> None:
            super().__init__()
            self.base = base
            self.lora_A = nn.Linear(base.in_features, lora.rank, bias=False, dtype=torch.float32)
            self.lora_B = nn.Linear(lora.rank, base.out_features, bias=False, dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            result = self.base(x)
            return (result + self.lora_B(self.lora_A(x.to(torch.float32))) * 2.0).to(result.dtype)

    model.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    shapes = {f"{name}.weight": tuple(module.weight.shape) for name, module in linear.items()}
    for name in dict.fromkeys(name.rpartition(".lora_")[0] for name in lora_shapes(shapes, lora.rank, lora.targets)):
        model.set_submodule(name, Adapted(linear[name]))
    return model


@contextlib.contextmanager
def _explained(flag: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{flag}: {first_line(error)}") from error


@contextlib.contextmanager
def _counting() -> Iterator[Any]:
    """Counts fake tensors, including those that autograd makes and frees."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Counter(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self._sizes: dict[int, int] = {}

        def start(self) -> int:
            """Forgets the peak so far; returns what is live."""
            self.peak = self.live
            return self.live

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return tree_map_only(torch.Tensor, self._see, function(*args, **(kwargs or {})))

        def _see(self, tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:  # views share a storage
                self._sizes[key] = storage.nbytes()
                self.live += self._sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, key)
            return tensor

        def _drop(self, key: int) -> None:
            self.live -= self._sizes.pop(key)

    with FakeTensorMode(), Counter() as counter:
        yield counter
