"""Gram matrices X^T X of the inputs of linear layers, summed over tokens in float64, kept in float32.

Layer by layer: every batch passes through the model with all decoder layers but one switched off, and the one gets the
hidden state that the layer before it left on the disk. In memory: embeddings and head, one layer, its Gram matrices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from merge.architecture import Stack
from merge.errors import OutputError
from merge.output.directory import sync
from merge.statistics.data import Batches
from merge.statistics.models import Loader, switched_off
from merge.statistics.parts import Parts

Advance = Callable[[float], None]  # the share of the work that is done now, of 1


class Grams:
    """Hooks on linear layers; `tensors` are the sums so far."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}

    @contextlib.contextmanager
    def of(self, module: Any, prefix: str, names: set[str]) -> Iterator[None]:
        """Listens to the linear layers in a module whose weights are among `names`."""
        from torch import nn

        handles = [
            child.register_forward_pre_hook(self._hook(f"{prefix}{name}.weight"))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear) and f"{prefix}{name}.weight" in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[Any, ...]) -> None:
            import torch

            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).to(torch.float64)
            if name in self._sums:
                self._sums[name].addmm_(flat.mT, flat)
            else:
                self._sums[name] = flat.mT @ flat

        return add

    def tensors(self) -> dict[str, Any]:
        return {f"gram.{name}": total.float() for name, total in sorted(self._sums.items())}


class _Enough(Exception):
    """The head has been reached; its product is not needed."""


class Layerwise:
    """The parts of one model: a part for each layer, and one for the linear layers outside of them."""

    def __init__(self, model: Any, stack: Stack, loader: Loader, batches: Batches, parts: Parts) -> None:
        self._model, self._stack, self._loader, self._batches, self._parts = model, stack, loader, batches, parts
        self._layers = list(model.get_submodule(stack.prefix.rstrip(".")))
        self._names = [name for name, _ in model.named_parameters()]
        self.parts = [f"gram-{i:04d}.safetensors" for i in range(len(self._layers))] + ["gram-rest.safetensors"]

    def run(self, advance: Advance) -> int:
        """Makes the parts that are not there yet; how many were."""
        done = 0
        while done < len(self.parts) and self._parts.has(self.parts[done]):
            done += 1
        if done == len(self.parts):
            return done
        if done and not self._hidden(done).is_file():
            done = 0
        advance(done / len(self.parts))
        outside = [name for name in self._names if self._stack.layer(name) is None]
        self._loader.load(outside)
        for i in range(done, len(self._layers)):
            names = [name for name in self._names if (found := self._stack.layer(name)) and found[0] == i]
            self._layer(i, names, lambda share: advance(share / len(self.parts)))
        self._rest(set(outside))
        return done

    def _hidden(self, i: int) -> Any:
        """File of the hidden states that go into layer i, batch after batch."""
        return self._parts.path(f"hidden-{i:04d}")

    def _layer(self, i: int, names: list[str], advance: Advance) -> None:
        import torch

        self._loader.load(names)
        layer, grams = self._layers[i], Grams()
        new = self._parts.path("hidden.new")
        forward = type(layer).forward

        def run(hidden: Any, *others: Any, **keywords: Any) -> Any:
            states = hidden if source is None else _read(source, hidden)
            result = forward(layer, states, *others, **keywords)
            target.write(np.ascontiguousarray(result.numpy()).data)
            return result

        with contextlib.ExitStack() as files:
            source = files.enter_context(open(self._hidden(i), "rb")) if i else None
            target = files.enter_context(open(new, "wb"))
            files.enter_context(torch.no_grad())
            files.enter_context(grams.of(layer, self._stack.name(i, ""), set(names)))
            files.enter_context(switched_off(self._layers, {i: run}))
            for batch in self._batches.all:
                self._model.base_model(input_ids=torch.tensor(batch), use_cache=False)
                advance(len(batch) * len(batch[0]) / self._batches.tokens)
        sync(new)
        os.replace(new, self._hidden(i + 1))
        self._parts.save(self.parts[i], grams.tensors())
        self._hidden(i).unlink(missing_ok=True)
        layer.to("meta")

    def _rest(self, outside: set[str]) -> None:
        import torch

        grams, last = Grams(), len(self._layers) - 1
        head = self._model.get_output_embeddings()

        def enough(module: Any, inputs: tuple[Any, ...]) -> None:
            raise _Enough

        with contextlib.ExitStack() as files:
            source = files.enter_context(open(self._hidden(last + 1), "rb"))
            files.enter_context(torch.no_grad())
            files.enter_context(grams.of(self._model, "", outside))
            files.enter_context(switched_off(self._layers, {last: lambda hidden, *_, **__: _read(source, hidden)}))
            handle = head.register_forward_pre_hook(enough) if head is not None else None
            for batch in self._batches.all:
                with contextlib.suppress(_Enough):
                    self._model(input_ids=torch.tensor(batch), use_cache=False)
            if handle is not None:
                handle.remove()
        self._parts.save(self.parts[-1], grams.tensors())
        self._hidden(last + 1).unlink()


def _read(file: Any, like: Any) -> Any:
    import torch

    data = np.empty(like.numel(), np.float32)
    if file.readinto(data.data.cast("B")) != data.nbytes:
        raise OutputError(f"{file.name}: is cut short. Start anew with --force.")
    return torch.from_numpy(data).view(like.shape)


def whole_grams(model: Any, names: set[str], batches: Batches, advance: Advance) -> dict[str, Any]:
    """The same with the whole model in memory, for architectures that cannot be run layer by layer."""
    import torch

    grams = Grams()
    with torch.no_grad(), grams.of(model, "", names):
        for batch in batches.all:
            model(input_ids=torch.tensor(batch), use_cache=False)
            advance(len(batch) * len(batch[0]) / batches.tokens)
    return grams.tensors()
