"""Gram matrices X^T X of the inputs of linear layers, summed over tokens in float64, kept in float32.

Layer by layer: every batch passes through one decoder layer, from the hidden state that the layer before it left on the
disk, before the next layer is read. In memory: one layer and its Gram matrices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from merge.errors import CheckpointError, OutputError
from merge.layerwise import LayerRunner
from merge.output.directory import sync
from merge.statistics.data import Batches
from merge.statistics.parts import Parts

Advance = Callable[[float], None]  # the share of the work that is done now, of 1


class Grams:
    """Hooks on linear layers; `tensors` are the sums so far."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}

    @contextlib.contextmanager
    def of(self, module: Any, names: Mapping[int, str]) -> Iterator[None]:
        """Listens to the linear layers in a module; `names`: by the id of a weight, under which it is stored."""
        from torch import nn

        handles = [
            child.register_forward_pre_hook(self._hook(names[id(child)]))
            for child in module.modules()
            if isinstance(child, nn.Linear) and id(child) in names
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

    def __init__(self, runner: LayerRunner, batches: Batches, parts: Parts) -> None:
        import torch
        from torch import nn

        self._runner, self._parts = runner, parts
        self._batches = [torch.tensor(batch) for batch in batches.all]
        self._share = 1 / sum(tokens.numel() for tokens in self._batches)
        # Linear layers whose weights are stored as they are and tied to nothing.
        self._names = {
            id(module): slot.pieces[0].tensor
            for slot in runner.weights.all
            for module, key in slot.places
            if isinstance(module, nn.Linear) and key == "weight" and slot.is_plain and len(slot.names) == 1
        }
        if not self._names:
            raise CheckpointError(
                f"{runner.path}: has no linear layers whose inputs could be recorded, as regmean needs."
            )
        n_layers = len(runner.layers)
        self.parts = [f"gram-{i:04d}.safetensors" for i in range(n_layers)] + ["gram-rest.safetensors"]

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
        for i in range(done, len(self._runner.layers)):
            self._layer(i, lambda share: advance(share / len(self.parts)))
        self._rest()
        return done

    def _hidden(self, i: int) -> Any:
        """File of the hidden states that go into layer i, batch after batch."""
        return self._parts.path(f"hidden-{i:04d}")

    def _layer(self, i: int, advance: Advance) -> None:
        grams, new = Grams(), self._parts.path("hidden.new")
        with contextlib.ExitStack() as files:
            source = files.enter_context(open(self._hidden(i), "rb")) if i else None
            target = files.enter_context(open(new, "wb"))
            run = files.enter_context(self._runner.layer(i))
            files.enter_context(grams.of(self._runner.layers[i], self._names))
            for tokens in self._batches:
                hidden = self._runner.embed(tokens) if source is None else _read(source, self._runner.shape(tokens))
                target.write(np.ascontiguousarray(run(tokens, hidden).numpy()).data)
                advance(tokens.numel() * self._share)
        sync(new)
        os.replace(new, self._hidden(i + 1))
        self._parts.save(self.parts[i], grams.tensors())
        self._hidden(i).unlink(missing_ok=True)

    def _rest(self) -> None:
        """What is outside the layers, and the head's input; its product is not needed."""
        grams, runner = Grams(), self._runner
        behind = self._hidden(len(runner.layers))

        def enough(*_: Any) -> None:
            raise _Enough

        with contextlib.ExitStack() as files:
            source = files.enter_context(open(behind, "rb"))
            files.enter_context(grams.of(runner.model, self._names))
            handle = runner.model.get_output_embeddings().register_forward_pre_hook(enough)
            files.callback(handle.remove)
            for tokens in self._batches:
                with contextlib.suppress(_Enough):
                    runner.finish(tokens, _read(source, runner.shape(tokens)), blank=False)
        self._parts.save(self.parts[-1], grams.tensors())
        behind.unlink()


def _read(file: Any, shape: tuple[int, ...]) -> Any:
    import torch

    data = np.empty(shape, np.float32)
    if file.readinto(data.data.cast("B")) != data.nbytes:
        raise OutputError(f"{file.name}: is cut short. Use --force to start over.")
    return torch.from_numpy(data)


def whole_grams(model: Any, names: set[str], batches: Batches, advance: Advance) -> dict[str, Any]:
    """The same with the whole model in memory, for architectures that cannot be run layer by layer."""
    import torch

    grams = Grams()
    stored = {id(module): f"{name}.weight" for name, module in model.named_modules() if f"{name}.weight" in names}
    with torch.no_grad(), grams.of(model, stored):
        for batch in batches.all:
            model(input_ids=torch.tensor(batch), use_cache=False)
            advance(len(batch) * len(batch[0]) / batches.tokens)
    return grams.tensors()
