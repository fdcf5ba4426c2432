"""Tied weights: which tensors of each input are one, as transformers reads its config and its files.

A tensor that the config ties to another one follows it, under every name that transformers ties: a stored copy is
neither merged separately nor written again. A tensor stored with other values is no copy: transformers loads it, so it
is kept. The output is tied if no input has such a separate tensor; otherwise every name is written, and the config
declares nothing tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merge.architecture import Architecture, Tie, config_section, flag_of
from merge.checkpoint import Checkpoint
from merge.checkpoint.compare import same_numbers
from merge.plan import TensorRef


@dataclass(frozen=True)
class Named:
    """An input's tensors under common names, and the common name of each of its own names."""

    checkpoint: Checkpoint
    architecture: Architecture
    tensors: dict[str, TensorRef]
    common: Mapping[str, str]


@dataclass
class Tying:
    """The inputs' ties, resolved.

    Attributes:
        tied: for each input, whether it has no separate head.
        flags: sections of the config -> the value of tie_word_embeddings, where it must change.
    """

    tied: list[bool]
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """One tied matrix: its common names, the source first, and its names in the first model's class."""

    names: tuple[str, ...]
    own: tuple[str, ...]
    tie: Tie


@dataclass(frozen=True)
class _State:
    """A group in one input.

    Attributes:
        holds: whether its config ties the names; None: its class does not know that tie.
        present: names that are stored.
        copies: names that hold the same values as the tensor they are tied to.
        assumed: the tie is assumed, because no head is stored and the config does not mention it.
    """

    holds: bool | None
    present: tuple[str, ...]
    copies: tuple[str, ...] = ()
    assumed: bool = False

    def is_split(self, source: str) -> bool:
        """Whether several of these names are stored with different values."""
        if self.holds is None:
            return any(name != source for name in self.present)
        return bool(self.present) if not self.holds else len(self.present) - len(self.copies) > 1


def resolve_ties(models: Sequence[Named]) -> Tying:
    """Removes tied copies from the inputs' tensors, or adds them if the output is not tied; see the module."""
    result = Tying([False] * len(models))
    union = list(dict.fromkeys(name for model in models for name in model.tensors))
    lead = next((model for model in models if places(model.architecture, union)), None)
    if lead is None:
        return result
    groups = list(_groups(lead.architecture, union))
    states = [[_state(model, group, lead) for model in models] for group in groups]
    splits = [
        any(state.is_split(group.names[0]) for state in found) for group, found in zip(groups, states, strict=True)
    ]
    for group, found, split in zip(groups, states, splits, strict=True):
        related = [s for g, s in zip(groups, splits, strict=True) if _switch(g) == _switch(group)]
        if split or (any(related) and not group.tie.always):
            _write_all(group, models, found, result)
        else:
            _write_one(models, found, result)
    return result


def places(architecture: Architecture, names: Iterable[str]) -> dict[str, str]:
    """The parameters of a class that may be tied -> their names among `names`, for existing ones."""
    wanted = dict.fromkeys(name for tie in architecture.ties for name in (tie.source, tie.target))
    ends = {".".join(name.split(".")[-2:]) for name in wanted}
    found: dict[str, str] = {}
    for name in names:
        if ".".join(name.split(".")[-2:]) in ends and (own := architecture.parameter(name, wanted)) is not None:
            found.setdefault(own, name)
    return found


def _groups(architecture: Architecture, names: Sequence[str]) -> Iterator[_Group]:
    place = places(architecture, names)
    by_source: dict[str, list[Tie]] = {}
    for tie in architecture.ties:
        by_source.setdefault(tie.source, []).append(tie)
    for source, ties in by_source.items():
        own = (source, *(tie.target for tie in ties))
        yield _Group(tuple(place.get(name, name) for name in own), own, ties[0])


def _switch(group: _Group) -> tuple[str, str]:
    """The names that one flag of the config ties together."""
    return group.tie.section, group.tie.flags


def _state(model: Named, group: _Group, lead: Named) -> _State:
    present = tuple(name for name in group.names if name in model.tensors)
    tie = _tie_of(model, group, lead)
    if tie is None:
        return _State(None, present)
    config = model.checkpoint.config
    holds = tie.holds(config)
    unsaid = flag_of(config) is None and flag_of(config_section(config, tie.section)) is None
    assumed = not holds and unsaid and present == group.names[:1]
    if not (holds or assumed) or not present:
        return _State(holds or assumed, present)
    first = model.tensors[present[0]]
    files = model.checkpoint.files
    copies = tuple(name for name in present[1:] if same_numbers(first, model.tensors[name], files))
    return _State(True, present, copies, assumed)


def _tie_of(model: Named, group: _Group, lead: Named) -> Tie | None:
    """How the model's class ties a group."""
    ties = model.architecture.ties
    if model.architecture.name == lead.architecture.name:
        return next((tie for tie in ties if tie.target in group.own), None)
    place = places(model.architecture, model.checkpoint.tensors)
    for tie in ties:
        stored = [place[name] for name in (tie.source, tie.target) if name in place]
        if any(model.common.get(name, name) in group.names for name in stored):
            return tie
    return None


def _write_one(models: Sequence[Named], states: Sequence[_State], result: Tying) -> None:
    """Keeps the matrix once, under the first model's name."""
    name = next((state.present[0] for state in states if state.present), None)
    for i, (model, state) in enumerate(zip(models, states, strict=True)):
        for copy in state.copies:
            del model.tensors[copy]
            result.notes.append(
                f"{model.checkpoint.ref.text}: {copy} is stored but tied to {state.present[0]}, and not written again"
            )
        if name is not None and state.present and state.present[0] != name:
            model.tensors[name] = model.tensors.pop(state.present[0])
        result.tied[i] = result.tied[i] or bool(state.holds and state.present)
    if states[0].assumed:
        result.flags[""] = True


def _write_all(group: _Group, models: Sequence[Named], states: Sequence[_State], result: Tying) -> None:
    """Keeps every name; a name that is tied in an input gets the values of the tensor it is tied to."""
    for model, state in zip(models, states, strict=True):
        if not state.holds or not state.present:
            continue
        first, text = state.present[0], model.checkpoint.ref.text
        apart = [name for name in state.present[1:] if name not in state.copies]
        for name in group.names:
            if name == first or name in apart:
                continue
            if group.tie.always and not any(name in other.present for other in states):
                continue
            model.tensors[name] = model.tensors[first]
            if name not in state.present:
                result.notes.append(f"{text}: its {_what(name)} is tied; {first} is merged as {name}")
        for name in apart:
            result.notes.append(
                f"{text}: config.json ties {name} to {first}, but the file has different values there; both are kept"
            )
    if states[0].holds and not group.tie.always:
        result.flags |= dict.fromkeys(("", group.tie.section), False)


def _what(name: str) -> str:
    return "head" if "embed" not in name else "embedding"
