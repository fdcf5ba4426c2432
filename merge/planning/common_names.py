"""Maps the tensor names of one model to another's, for the same architecture saved in different ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge.architecture import Architecture


@dataclass(frozen=True)
class NameMap:
    """`names`: this model's names -> the other's. `changes`: descriptions of the mapping, for notes."""

    names: dict[str, str]
    changes: tuple[str, ...]


def common_names(
    names: Sequence[str], architecture: Architecture, wanted: Sequence[str], wanted_architecture: Architecture
) -> NameMap:
    """Maps a model's names to another model's: first as transformers maps both, then by prefixes, one for each tower.

    Args:
        names, architecture: of the model whose names are mapped.
        wanted, wanted_architecture: of the model whose names are the target.
    """
    common = {name: name for name in names}
    changes = []
    if loaded := _as_loaded(names, architecture, wanted, wanted_architecture):
        common |= loaded
        first = next(iter(loaded))
        others = f" and {len(loaded) - 1} more" if len(loaded) > 1 else ""
        changes.append(f"{first} is {loaded[first]}{others}, as transformers maps names, in")
    while (found := map_prefix(list(common.values()), wanted)) is not None:
        removed, added = found
        change = f'"{removed}" removed from' if removed else f'"{added}" put before'
        changes.append(f'"{added}" put for "{removed}" in' if removed and added else change)
        target = dict.fromkeys(wanted)
        common = {name: rename(now, removed, added, target) for name, now in common.items()}
    return NameMap(common, tuple(changes))


def _as_loaded(
    names: Sequence[str], architecture: Architecture, wanted: Sequence[str], wanted_architecture: Architecture
) -> dict[str, str]:
    """Names that transformers loads into the same parameter as a name in `wanted`, if no name is mapped twice."""
    known, taken = dict.fromkeys(wanted), dict.fromkeys(names)
    rest = [name for name in names if name not in known]
    if not rest:
        return {}
    place = {wanted_architecture.loaded_name(name): name for name in wanted if name not in taken}
    found = {name: target for name in rest if (target := place.get(architecture.loaded_name(name))) is not None}
    counts = Counter(found.values())
    return {name: target for name, target in found.items() if counts[target] == 1}


def map_prefix(names: Sequence[str], wanted: Sequence[str]) -> tuple[str, str] | None:
    """(prefix to remove, prefix to add) that makes more of `names` match `wanted`; None if not exactly one does."""
    target = dict.fromkeys(wanted)
    direct = sum(name in target for name in names)
    if direct == len(names):
        return None
    candidates = [(_first_part(name), "") for name in names if "." in name]
    candidates += [("", _first_part(name)) for name in wanted if "." in name]
    candidates += _between_stacks(names, wanted)
    scores: dict[tuple[str, ...], tuple[int, tuple[str, str]]] = {}  # by the resulting names
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
    """The name with its prefix changed; unchanged if it already matches, or would not match afterwards."""
    if name in target:
        return name
    changed = added + name[len(removed) :] if name.startswith(removed) else name
    return changed if changed in target else name
