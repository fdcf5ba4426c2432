"""The steps of a mixture of experts: routers, experts' MLPs as copies or derived tensors, everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from merge.architecture import Stack
from merge.jobs.mixtures.fit import DEAD_NEURONS, EMBEDDING, HEAD, NORM, STACK, Dense
from merge.jobs.mixtures.router import Router
from merge.moe_layouts import PROJECTIONS
from merge.plan import COPY, Derived, Step, TensorRef
from merge.random_keys import random_key
from merge.recipe.model import Expert


class ExpertSteps:
    """Turns models that fit into steps; offsets in the output are set later."""

    def __init__(self, dense: Dense, router: Router) -> None:
        self._dense, self._router = dense, router
        self._recipe, self._mixture, self._layout = dense.recipe, dense.mixture, dense.layout

    def all(self) -> Iterator[Step]:
        """In the order of the computation: embedding, layers with their experts, norm and head."""
        stack = Stack(STACK, self._dense.n_layers)
        layers: list[list[Step]] = [[] for _ in range(self._dense.n_layers)]
        outside: dict[str, Step] = {}
        for step in self._dense.rest:
            place = stack.layer(step.name)
            if place is None:
                outside[step.name] = step
            else:
                layers[place[0]].append(step)
        yield outside[EMBEDDING]
        for layer, steps in enumerate(layers):
            yield from steps
            yield from self._zero_biases(layer, {step.name: None for step in steps})
            yield from self._block(layer)
        yield outside[NORM]
        if HEAD in outside:
            yield outside[HEAD]
        elif not self._layout.ties:
            yield dataclasses.replace(outside[EMBEDDING], name=HEAD)

    def _zero_biases(self, layer: int, there: dict[str, None]) -> Iterator[Step]:
        for suffix in self._layout.zero_biases:
            name = f"{STACK}{layer}.{suffix}"
            if name not in there:
                heads = "num_attention_heads" if "q_proj" in suffix else "num_key_value_heads"
                yield self._zeros(
                    name, (self._dense.config[heads] * self._dense.config["head_dim"],), self._dense.dtype(layer)
                )

    def _block(self, layer: int) -> Iterator[Step]:
        """Router, experts and shared expert of a layer."""
        at, dtype = f"{STACK}{layer}.", self._dense.dtype(layer)
        gate = f"{at}{self._layout.block}.gate.weight"
        yield self._made(gate, self._router.gate(gate, layer, dtype), dtype)
        for number in range(len(self._mixture.experts)):
            for projection in PROJECTIONS:
                yield self._expert(layer, number, projection, f"{at}{self._layout.expert(number, projection)}")
        if self._layout.shared_gate:
            name = f"{at}{self._layout.block}.shared_expert_gate.weight"
            yield self._made(name, self._router.shared_gate(name, layer, dtype), dtype)
        if self._mixture.shared:
            number = len(self._mixture.experts)
            for projection in PROJECTIONS:
                yield self._expert(layer, number, projection, f"{at}{self._layout.shared_expert(projection)}")
        elif self._layout.needs_shared:
            hidden = self._dense.config["hidden_size"]
            for projection in PROJECTIONS:
                shape = (hidden, DEAD_NEURONS) if projection == "down_proj" else (DEAD_NEURONS, hidden)
                yield self._zeros(f"{at}{self._layout.shared_expert(projection)}", shape, dtype)

    def _expert(self, layer: int, number: int, projection: str, name: str) -> Step:
        source = f"{STACK}{layer}.mlp.{projection}.weight"
        model = self._dense.models[number]
        expert = (*self._mixture.experts, *self._mixture.shared)[number]
        ref = self._changed(self._dense.inputs.all[model].tensors[source], expert, number, layer, projection, name)
        dtype = self._dense.dtype(layer, projection)
        parameters: dict[str, Any] = {}
        if projection == "down_proj" and expert.residual_scale != 1.0:
            parameters["scale"] = (expert.residual_scale,)
        method = COPY if ref.copies_to(dtype) and not parameters else "passthrough"
        return Step(name, ref.shape, dtype, "", 0, method, (ref,), (model,), parameters=parameters)

    def _changed(
        self, ref: TensorRef, expert: Expert, number: int, layer: int, projection: str, name: str
    ) -> TensorRef:
        """The tensor, with some neurons redrawn and noise added if the recipe says so."""
        seed, ratio = self._recipe.seed, self._mixture.reinit
        if ratio and number < len(self._mixture.experts):
            parameters = {
                "neurons": random_key(seed, f"neurons of layer {layer}", number),
                "key": random_key(seed, f"{name} anew", number),
                "axis": 1 if projection == "down_proj" else 0,
                "ratio": ratio,
            }
            ref = _derived(ref, "reinitialised", f"{ref.name} (expert {number}, partly new)", parameters)
        if expert.noise_scale:
            key = random_key(seed, f"{name} noise", number)
            parameters = {"key": key, "scale": expert.noise_scale}
            ref = _derived(ref, "noisy", f"{ref.name} with noise (expert {number})", parameters)
        return ref

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: str) -> Step:
        return self._made(name, Derived(f"{name} (zeros)", dtype, shape, "zeros"), dtype)

    def _made(self, name: str, ref: TensorRef, dtype: str) -> Step:
        return Step(name, ref.shape, dtype, "", 0, "passthrough", (ref,), (0,))


def _derived(ref: TensorRef, operation: str, name: str, parameters: dict[str, Any]) -> TensorRef:
    return Derived(name, ref.dtype, ref.shape, operation, (ref,), parameters)
