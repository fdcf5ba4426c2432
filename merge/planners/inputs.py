"""The input models, opened, with their tensors under common names: prefixes mapped, tied heads resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.architecture import Stack, find_stacks, is_embedding, is_head, is_input_side, main_stack, says_tied
from merge.checkpoint import Checkpoint
from merge.plan import SourceModel, TensorRef
from merge.planners.models import key_of, open_models
from merge.recipe.model import ModelRef, Recipe


@dataclass(frozen=True)
class Input:
    """One input model.

    Attributes:
        tensors: common name -> where it is stored; a head that is tied is its embedding.
        tied: whether the model has no head of its own.
        stacks, main: its layer stacks under common names, and the one that layer_range counts.
    """

    checkpoint: Checkpoint
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


class Inputs:
    """All input models of a recipe; the first one is the donor of names, config and tokenizer."""

    def __init__(self, recipe: Recipe, known: Mapping[str, Checkpoint] | None = None) -> None:
        """known: checkpoints that no directory holds (yet), by the path of their references."""
        checkpoints = open_models(recipe, known)
        self.notes: list[str] = []
        donor = checkpoints[0]
        aligned = [donor.tensors] + [self._align(donor, other) for other in checkpoints[1:]]
        self.all = self._tie(checkpoints, aligned)
        self._places = {key_of(model.ref): i for i, model in enumerate(self.all)}
        self._suffixes: dict[tuple[int, Stack], dict[int, list[str]]] = {}
        for model in self.all:
            self.notes += [f"{model.ref.text}: {note}" for note in model.checkpoint.notes]
            if model.ref.override_architecture is not None:
                self.notes.append(
                    f"{model.ref.text}: override_architecture has no effect: structure is read from tensor names"
                )

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
        """What stands behind the layer's number in the tensors of one layer of an input."""
        found = self._suffixes.get((place, stack))
        if found is None:
            found = self._suffixes[place, stack] = {}
            for name in self.all[place].tensors:
                if (at := stack.layer(name)) is not None:
                    found.setdefault(at[0], []).append(at[1])
        return found.get(layer, [])

    def names(self) -> list[str]:
        """The union of the inputs' tensors, in the order of the computation: embeddings, layers by number, the rest."""
        union = dict.fromkeys(name for model in self.all for name in model.tensors)
        return sorted(union, key=self._rank)  # stable: else the donor's order, then what only others have

    def _rank(self, name: str) -> tuple[int, int]:
        for stack in self.donor.stacks:
            if (found := stack.layer(name)) is not None:
                return 1, found[0]
        return (0, 0) if is_input_side(name) else (2, 0)

    def _align(self, donor: Checkpoint, other: Checkpoint) -> dict[str, TensorRef]:
        """The other model's tensors under the donor's names, where prefixes make the difference; one a tower."""
        tensors = other.tensors
        while (found := map_prefix(list(tensors), list(donor.tensors))) is not None:
            removed, added = found
            change = f'"{removed}" removed from' if removed else f'"{added}" put before'
            change = f'"{added}" put for "{removed}" in' if removed and added else change
            self.notes.append(f"{other.ref.text}: {change} tensor names, to match {donor.ref.text}")
            tensors = {rename(name, removed, added, donor.tensors): ref for name, ref in tensors.items()}
        return tensors

    def _tie(self, checkpoints: Sequence[Checkpoint], aligned: Sequence[Mapping[str, TensorRef]]) -> list[Input]:
        """One rule: a model is tied if its config says so, or if it stores no head and its config does not deny it.

        If all models are tied, so is the output, and a stored copy of the embedding is not written; if one is not,
        the others' heads are their embeddings.
        """
        heads = [next((name for name in tensors if is_head(name)), None) for tensors in aligned]
        embeddings = [next((name for name in tensors if is_embedding(name)), None) for tensors in aligned]
        tied = [
            embedding is not None
            and (says_tied(checkpoint.config) or (head is None and says_tied(checkpoint.config) is None))
            for checkpoint, head, embedding in zip(checkpoints, heads, embeddings, strict=True)
        ]
        head_name = next((head for head, is_tied in zip(heads, tied, strict=True) if head and not is_tied), None)
        inputs = []
        for i, checkpoint in enumerate(checkpoints):
            tensors = dict(aligned[i])
            embedding = embeddings[i]
            if tied[i] and embedding is not None:
                self._resolve_tie(checkpoint, tensors, heads[i], head_name, embedding)
            stacks = find_stacks(tensors, checkpoint.config)
            inputs.append(Input(checkpoint, tensors, tied[i], stacks, main_stack(stacks, checkpoint.config)))
        return inputs

    def _resolve_tie(
        self,
        checkpoint: Checkpoint,
        tensors: dict[str, TensorRef],
        head: str | None,
        head_name: str | None,
        embedding: str,
    ) -> None:
        if head_name is not None:
            tensors[head_name] = tensors[embedding]
            self.notes.append(f"{checkpoint.ref.text}: its head is tied; {embedding} is merged as {head_name}")
        elif head is not None:
            del tensors[head]
            self.notes.append(f"{checkpoint.ref.text}: {head} is stored but tied to {embedding}, and not written again")


def map_prefix(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, str] | None:
    """(prefix to remove, prefix to add) that makes more of `names` match `wanted`; None if not exactly one does."""
    target = dict.fromkeys(wanted)
    direct = sum(name in target for name in names)
    if direct == len(names):
        return None
    candidates = [(_first_part(name), "") for name in names if "." in name]
    candidates += [("", _first_part(name)) for name in wanted if "." in name]
    candidates += _between_stacks(names, wanted)
    scores: dict[tuple[str, ...], tuple[int, tuple[str, str]]] = {}  # by what the names become
    for candidate in dict.fromkeys(candidates):
        renamed = tuple(rename(name, *candidate, target) for name in names)
        if len(set(renamed)) == len(names):  # two tensors must not become one
            scores.setdefault(renamed, (sum(name in target for name in renamed), candidate))
    best = max((score for score, _ in scores.values()), default=0)
    winners = [candidate for score, candidate in scores.values() if score == best]
    return winners[0] if best > direct and len(winners) == 1 else None


def _between_stacks(names: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(model., model.language_model.) from model.layers.0 and model.language_model.layers.0, and the like."""
    ours, theirs = (dict.fromkeys(filter(None, map(_before_number, some))) for some in (names, wanted))
    for removed in ours:
        for added in theirs:
            a, b = removed.split(".")[:-1], added.split(".")[:-1]
            while a and b and a[-1] == b[-1]:
                a, b = a[:-1], b[:-1]
            if (a or b) and len(a) < len(removed.split(".")) - 1:
                yield "".join(f"{part}." for part in a), "".join(f"{part}." for part in b)


def _before_number(name: str) -> str | None:
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "".join(f"{part}." for part in parts[:place]) if place is not None else None


def _first_part(name: str) -> str:
    return name.split(".", 1)[0] + "."


def rename(name: str, removed: str, added: str, target: Mapping[str, object]) -> str:
    """The name with its prefix changed; a name that matches already, or would match nothing, stays."""
    if name in target:
        return name
    changed = added + name[len(removed) :] if name.startswith(removed) else name
    return changed if changed in target else name
