"""Target: which source tensors make an output tensor; merge.jobs.stacks arranges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge.architecture import Stack
from merge.output.layers import Restacked
from merge.plan import TensorRef
from merge.planning.inputs import Input
from merge.recipe.model import Settings, Slice, Source


class Slot(NamedTuple):  # a dataclass takes three times as long to make
    """One source of an output tensor: the model (index in Inputs.all), the common name there, its settings and file."""

    model: int
    name: str
    settings: tuple[Settings, ...]  # innermost first
    statistics: str | None = None
    made: TensorRef | None = None  # in place of the model's tensor of that name


class Target(NamedTuple):
    """One output tensor before its numbers are resolved.

    Attributes:
        slots: its sources in the recipe's order, including the base if the recipe lists it.
        base: the base's slot, if the recipe has a base.
        settings: levels of shared parameters, innermost first.
        t: place in the slice, 0 to 1; 0 outside the layers.
        method: name of its merge method: the slice's, the module's or the recipe's.
    """

    name: str
    slots: tuple[Slot, ...]
    base: Slot | None
    settings: tuple[Settings, ...]
    t: float
    layer: int | None
    method: str


@dataclass(frozen=True)
class Layout:
    """All targets; `stacks`: the origin of each output layer, for stacks that differ from the donor's."""

    targets: tuple[Target, ...]
    stacks: tuple[Restacked, ...] = ()


@dataclass(frozen=True)
class Tower:
    """The part of the output that one list of models or slices makes: all of it, or a module.

    Attributes:
        path: in front of "slices.0" in Recipe.lines: "" or "modules.NAME.".
        kind: the module's name in merge.jobs.stacks.modules, by which the config is found.
        settings: levels of shared parameters outside the slices, innermost first.
        owns: whether a tensor belongs to it.
        stack: its layers in one of the inputs.
    """

    path: str
    kind: str
    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    method: str
    settings: tuple[Settings, ...]
    owns: Callable[[str], bool]
    stack: Callable[[Input], Stack | None]


def place_of(name: str, stacks: Sequence[Stack]) -> tuple[int | None, float]:
    """(layer, its place t) of a tensor; (None, 0) outside the layers."""
    for stack in stacks:
        found = stack.layer(name)
        if found is not None:
            return found[0], gradient_place(found[0], stack.n_layers)
    return None, 0.0


def gradient_place(layer: int, n_layers: int) -> float:
    """t = i / (L - 1); a slice of one layer is at 1."""
    return layer / (n_layers - 1) if n_layers > 1 else 1.0
