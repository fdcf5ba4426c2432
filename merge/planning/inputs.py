"""Opens the input models and puts their tensors under common names, with ties resolved."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge.architecture import Architecture, Stack, architecture_of, find_stacks, is_input_side, main_stack
from merge.checkpoint import Checkpoint
from merge.plan import SourceModel, TensorRef
from merge.planned import Planned, Said
from merge.planning.common_names import common_names
from merge.planning.models import open_models
from merge.planning.ties import Named, resolve_ties
from merge.quoting import some
from merge.recipe.mentioned import key_of
from merge.recipe.model import ModelRef, Recipe


@dataclass(frozen=True)
class Input:
    """One input model.

    Attributes:
        architecture: facts about its class, from transformers.
        tensors: common name -> its source; see merge.planning.ties.
        tied: whether the model has no head of its own.
        stacks, main: its layer stacks under common names, and the one that layer_range counts.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    tensors: Mapping[str, TensorRef]
    tied: bool
    stacks: tuple[Stack, ...]
    main: Stack | None

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @property
    def ref(self) -> ModelRef:
        return self.checkpoint.ref

    def source_model(self) -> SourceModel:
        checkpoint = self.checkpoint
        return SourceModel(checkpoint.ref.text, checkpoint.path, checkpoint.revision, checkpoint.files)


def _input(model: Named, tied: bool, stacks: tuple[Stack, ...]) -> Input:
    main = main_stack(stacks, model.checkpoint.config)
    return Input(model.checkpoint, model.architecture, model.tensors, tied, stacks, main)


@dataclass(frozen=True)
class Inputs:
    """All input models of a recipe; the first one is the donor of names, config and tokenizer.

    Attributes:
        copied: tensors of the donor that loading ignores and another input lacks; they are copied.
        tie_flags: sections of the config -> what tie_word_embeddings becomes there; see merge.planning.ties.
    """

    all: tuple[Input, ...]
    copied: frozenset[str]
    tie_flags: Mapping[str, bool]
    _places: Mapping[Hashable, int]
    _suffixes: dict[tuple[int, Stack], dict[int, list[str]]] = field(default_factory=dict, init=False, compare=False)

    @property
    def donor(self) -> Input:
        return self.all[0]

    def place(self, ref: ModelRef) -> int:
        """Index of a model in `all` and in Plan.models."""
        return self._places[key_of(ref)]

    @property
    def tied(self) -> bool:
        """Whether the output has no head of its own: if no input has one."""
        return all(model.tied for model in self.all)

    def suffixes(self, place: int, stack: Stack, layer: int) -> list[str]:
        """The parts of tensor names after the layer's number, for one layer of an input."""
        found = self._suffixes.get((place, stack))
        if found is None:
            found = self._suffixes[place, stack] = {}
            for name in self.all[place].tensors:
                if (at := stack.layer(name)) is not None:
                    found.setdefault(at[0], []).append(at[1])
        return found.get(layer, [])

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The union of the inputs' tensors, in the order of the computation: embeddings, layers by number, the rest."""
        union: dict[str, None] = {}
        for model in self.all:
            union |= dict.fromkeys(model.tensors)
        return tuple(sorted(union, key=self._rank))  # stable: otherwise the donor's order

    def _rank(self, name: str) -> tuple[int, int]:
        for stack in self.donor.stacks:
            if (found := stack.layer(name)) is not None:
                return 1, found[0]
        return (0, 0) if is_input_side(name) else (2, 0)


def open_inputs(recipe: Recipe, known: Mapping[str, Checkpoint] | None = None) -> Planned[Inputs]:
    """Opens the models of a recipe.

    Args:
        known: checkpoints that no directory holds (yet), by the path of their references.

    Raises:
        CheckpointError, RecipeError: see merge.planning.models.open_models.
    """
    said = Said()
    models = said.take(_named(open_models(recipe, known)))
    ties = resolve_ties(models)
    stacks = [find_stacks(model.tensors, model.checkpoint.config) for model in models]
    copied = said.take(_leave_out_unread(models, stacks))
    said.notes += ties.notes
    inputs = tuple(_input(*each) for each in zip(models, ties.tied, stacks, strict=True))
    for model in inputs:
        said.notes += [f"{model.ref.text}: {note}" for note in model.checkpoint.notes]
        if model.ref.override_architecture is not None:
            said.notes.append(
                f"{model.ref.text}: override_architecture has no effect: structure is read from tensor names"
            )
    places: dict[Hashable, int] = {key_of(model.ref): i for i, model in enumerate(inputs)}
    return said.with_value(Inputs(inputs, copied, ties.flags, places))


def _named(checkpoints: Sequence[Checkpoint]) -> Planned[list[Named]]:
    """Every input's tensors under the first one's names."""
    notes: list[str] = []
    found: list[Named] = []
    for checkpoint in checkpoints:
        architecture = architecture_of(checkpoint.config, checkpoint.tensors)
        common, tensors = {name: name for name in checkpoint.tensors}, dict(checkpoint.tensors)
        if found and checkpoint.tensors.keys() != found[0].tensors.keys():
            donor = found[0]
            mapped = common_names(list(checkpoint.tensors), architecture, list(donor.tensors), donor.architecture)
            common = mapped.names
            to_match = f"tensor names, to match {donor.checkpoint.ref.text}"
            notes += [f"{checkpoint.ref.text}: {change} {to_match}" for change in mapped.changes]
            tensors = {common[name]: ref for name, ref in checkpoint.tensors.items()}
        found.append(Named(checkpoint, architecture, tensors, common))
    return Planned(found, notes=tuple(notes))


def _leave_out_unread(models: Sequence[Named], stacks: Sequence[Sequence[Stack]]) -> Planned[frozenset[str]]:
    """Removes tensors that loading ignores or computes and the first input lacks; returns those that only others lack.

    These include layers for multi-token prediction, which a model's own config does not count.

    Args:
        stacks: of each model.
    """
    notes: list[str] = []
    donor, architecture = models[0], models[0].architecture
    counts: Counter[str] = Counter()
    for model in models:
        counts.update(model.tensors.keys())
    unread = [
        name
        for name, count in counts.items()
        if count < len(models)
        and (
            architecture.is_unread(architecture.loaded_name(name))
            or all(
                any(stack.is_beyond(name) for stack in found)
                for model, found in zip(models, stacks, strict=True)
                if name in model.tensors
            )
        )
    ]
    for model in models[1:]:
        gone = [name for name in unread if name not in donor.tensors and name in model.tensors]
        for name in gone:
            del model.tensors[name]
        if gone:
            notes.append(
                f"{model.checkpoint.ref.text}: {some(gone)}: left out: models of this architecture do not read them"
            )
    kept = [name for name in unread if name in donor.tensors]
    if kept:
        notes.append(
            f"{donor.checkpoint.ref.text}: {some(kept)}: copied: not in every input, and models of this "
            "architecture do not read them"
        )
    return Planned(frozenset(kept), notes=tuple(notes))
