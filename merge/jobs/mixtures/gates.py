"""Computes the router of a mixture of experts before the steps: hidden states of prompts in the base model.

A row is the mean state of an expert's positive prompts less that of the negative ones, at length 1; a prompt's state is
that of its last token (or the mean over its tokens) where it enters a layer. The base runs a layer at a time: in memory
are one layer in float32 and the states of all prompts. Each prompt is run by one thread, so that the numbers do not
depend on how many there are.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merge.engine.context import Context
from merge.errors import CheckpointError, MergeError
from merge.findings.router import RouterPrompts
from merge.jobs.mixtures.router import gate_key
from merge.one_thread import ONE_THREAD
from merge.sources.prompt_rows import unit

if TYPE_CHECKING:
    from merge.layerwise import LayerRunner

States = list[Any]  # of each prompt (1, token, hidden)
Through = Callable[[Any, Any], Any]  # (prompt, its state before a layer) -> its state after the layer
_LAYERS = "model.layers."
BEFORE_CHECKS = True


def find(context: Context, finding: RouterPrompts, tick: Callable[[], None]) -> None:
    """Computes the rows of all routers, journals them, and passes them to the reader."""
    keys = [gate_key(layer) for layer in range(len(finding.layers))]
    if not all(key in context.out.notes for key in keys):
        _RouterPass(context, finding).run(tick)
    for key in keys:
        context.reader.supply(key, np.frombuffer(base64.b64decode(context.out.notes[key]), "<f4"))


class _RouterPass:
    def __init__(self, context: Context, gates: RouterPrompts) -> None:
        self._context, self._gates = context, gates
        self._path = context.plan.models[gates.model].path
        # The prompts of all rows in one list, and the indices of each row's prompts in it.
        self._prompts = gates.prompts
        self._spans: list[list[tuple[int, int]]] = []
        place = 0
        for rows in (gates.positive, gates.negative):
            self._spans.append([])
            for row in rows:
                self._spans[-1].append((place, place + len(row)))
                place += len(row)

    def run(self, tick: Callable[[], None]) -> None:
        import torch

        runner = self._runner()
        prompts = [torch.tensor([prompt]) for prompt in self._prompts]
        states = [runner.embed(prompt) for prompt in prompts]
        last = len(runner.layers) - 1
        for number in range(last):
            self._keep(number, states)

            with ONE_THREAD, runner.layer(number) as through:

                def work(i: int, through: Through = through, states: States = states) -> None:
                    states[i] = through(prompts[i], states[i])

                self._context.crew.each(work, range(len(states)), tick)
        self._keep(last, states)

    def _runner(self) -> LayerRunner:
        """The base, with the plan's weights: adapters may be folded in."""
        from merge.architecture.loaded import whole_piece
        from merge.layerwise import LayerRunner, LayerWeights, Unstreamable, empty_model

        model = empty_model(self._path)
        tensors = {"model.embed_tokens.weight": self._gates.embedding}
        for number, (layer, refs) in enumerate(zip(model.model.layers, self._gates.layers, strict=True)):
            found = {name: ref.shape for name, ref in refs.items()}
            wanted = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
            if found and found != wanted:  # the last layer is not run and has no such function
                self._refuse(number, found, wanted)
            tensors |= {f"{_LAYERS}{number}.{name}": ref for name, ref in refs.items()}
        pieces = {name: (whole_piece(name, ref.shape),) for name, ref in tensors.items()}
        try:
            return LayerRunner(model, _LAYERS, LayerWeights(model, pieces, tensors, self._context.reader), self._path)
        except Unstreamable as error:
            raise CheckpointError(f"{self._path}: prompts cannot be run layer by layer: {error}.") from None

    def _refuse(self, number: int, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
        name = next(each for each in (*wanted, *found) if found.get(each) != wanted.get(each))
        raise CheckpointError(
            f"{self._path}: layer {number} does not fit the model that transformers builds from config.json ({name}: "
            f"{_shape(found.get(name))} in the files, {_shape(wanted.get(name))} expected), so prompts cannot "
            "be run. Correct the config, or choose gate_mode cheap_embed or random."
        )

    def _keep(self, number: int, states: States) -> None:
        """Journals the rows of a layer's router, float32 in base64."""
        rows = []
        for positive, negative in zip(*self._spans, strict=True):
            row = self._mean(states[slice(*positive)])
            rows.append(unit(row - self._mean(states[slice(*negative)])))
        matrix = np.stack(rows)
        if not np.isfinite(matrix).all():
            raise MergeError(f"{self._path}: the hidden states before layer {number} are not finite. Is it damaged?")
        self._context.out.keep(gate_key(number), base64.b64encode(matrix.astype("<f4").tobytes()).decode())

    def _mean(self, states: States) -> npt.NDArray[np.float64]:
        """Mean over prompts of the last tokens' states, or of the means over tokens; zeros without prompts."""
        total = np.zeros(self._gates.embedding.shape[1])
        for each in states:
            wide = each[0].double().numpy()
            total += wide.mean(axis=0) if self._gates.average else wide[-1]
        return total / max(1, len(states))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
