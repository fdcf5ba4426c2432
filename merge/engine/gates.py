"""The router of a mixture of experts, found before the steps: hidden states of prompts in the base model.

A row is the mean state of an expert's positive prompts less that of the negative ones, at length 1; a prompt's state is
that of its last token (or the mean over its tokens) where it enters a layer. The base runs a layer at a time: in memory
are one layer in float32 and the states of all prompts. Each prompt is run by one thread, so that the numbers do not
depend on how many there are.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.derive.prompt_rows import unit
from merge.engine.executors import ONE_THREAD, Context
from merge.errors import CheckpointError, MergeError
from merge.plan import Gates
from merge.planners.router import gate_key
from merge.quoting import excerpt

States = list[npt.NDArray[np.float32]]  # of each prompt (token, hidden)


def find_gates(context: Context, tick: Callable[[], None]) -> None:
    """Finds the routers' rows that the plan asks for, journals them, and hands them to the reader."""
    gates = context.plan.experts.gates if context.plan.experts else None
    if gates is None:
        return
    keys = [gate_key(layer) for layer in range(len(gates.layers))]
    if not all(key in context.out.notes for key in keys):
        _Pass(context, gates).run(tick)
    for key in keys:
        context.reader.supply(key, np.frombuffer(base64.b64decode(context.out.notes[key]), "<f4"))


class _Result(Exception):
    """Leaves the model's forward pass with a layer's output."""

    def __init__(self, states: Any) -> None:
        super().__init__()
        self.states = states


class _Pass:
    def __init__(self, context: Context, gates: Gates) -> None:
        from merge.statistics.models import empty_model

        self._context, self._gates = context, gates
        self._path = context.plan.models[gates.model].path
        self._model = empty_model(self._path).base_model
        self._layers = list(self._model.layers)
        # The prompts of all rows in one list, and where those of each row are in it.
        self._prompts = [prompt for rows in (gates.positive, gates.negative) for row in rows for prompt in row]
        self._spans: list[list[tuple[int, int]]] = []
        place = 0
        for rows in (gates.positive, gates.negative):
            self._spans.append([])
            for row in rows:
                self._spans[-1].append((place, place + len(row)))
                place += len(row)

    def run(self, tick: Callable[[], None]) -> None:
        states = [self._embedded(prompt) for prompt in self._prompts]
        last = len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            self._keep(number, states)
            if number == last:
                break
            self._load(layer, number)
            new: States = [np.empty(0, np.float32)] * len(states)

            def work(i: int, number: int = number, states: States = states, new: States = new) -> None:
                new[i] = self._through(number, states[i])

            with ONE_THREAD, _Only(self._layers, number):
                self._context.crew.each(work, range(len(states)), tick)
            states = new
            layer.to("meta")

    def _embedded(self, prompt: tuple[int, ...]) -> npt.NDArray[np.float32]:
        embedding = self._gates.embedding
        hidden = embedding.shape[1]
        states = np.empty((len(prompt), hidden), np.float32)
        for row, token in enumerate(prompt):
            self._context.reader.read_values(embedding, token * hidden, states[row])
        return states

    def _load(self, layer: Any, number: int) -> None:
        import torch

        tensors = {}
        for name, ref in self._gates.layers[number].items():
            values = np.empty(ref.size, np.float32)
            self._context.reader.read_values(ref, 0, values)
            tensors[name] = torch.from_numpy(values.reshape(ref.shape))
        try:
            layer.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            cause = excerpt(" ".join(str(error).split()))
            raise CheckpointError(
                f"{self._path}: layer {number} does not fit what transformers makes of config.json ({cause}), so "
                "prompts cannot be run. Mend the config, or choose gate_mode cheap_embed or random."
            ) from None

    def _through(self, number: int, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(token, hidden) -> (token, hidden): one prompt through one layer, with its positions and its mask"""
        import torch

        with torch.no_grad():
            try:
                self._model(inputs_embeds=torch.from_numpy(states)[None], use_cache=False)
            except _Result as result:
                found: npt.NDArray[np.float32] = result.states[0].numpy()
                return found
        raise MergeError(f"{self._path}: layer {number} was not reached.")

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
        """Over prompts: of the last tokens, or of the means over tokens; zeros where there is no prompt."""
        total = np.zeros(self._gates.embedding.shape[1])
        for each in states:
            wide = each.astype(np.float64)
            total += wide.mean(axis=0) if self._gates.average else wide[-1]
        return total / max(1, len(states))


class _Only:
    """Context: the layers before one hand the state on, and the pass ends behind it."""

    def __init__(self, layers: list[Any], number: int) -> None:
        self._layers, self._number = layers, number

    def __enter__(self) -> None:
        forward = self._layers[self._number].forward

        def run(*inputs: Any, **keywords: Any) -> Any:
            raise _Result(forward(*inputs, **keywords))

        for layer in self._layers[: self._number]:
            layer.forward = lambda hidden, *_, **__: hidden
        self._layers[self._number].forward = run

    def __exit__(self, *error: object) -> None:
        for layer in self._layers[: self._number + 1]:
            del layer.forward
