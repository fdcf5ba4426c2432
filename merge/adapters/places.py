"""Finds the tensors that an adapter names in the checkpoint.

PEFT names them as transformers' classes do. What stands on the disk may be called otherwise, tower by tower, may be
several tensors (experts), or a part of one (fused projections).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from merge.adapters.files import Adapter
from merge.architecture import is_embedding, is_head, says_tied
from merge.architecture.loaded import Loaded, Piece, Shape, how_loaded, whole_piece
from merge.checkpoint.checkpoint import Checkpoint
from merge.errors import CheckpointError
from merge.quoting import some


@dataclass(frozen=True)
class Place:
    """The stored tensors that make a tensor of the model in memory.

    Attributes:
        name: in memory, as the adapter has it.
        shape: in memory.
        pieces: its parts on the disk.
        stacked_inputs: a parameter of stacked matrices (experts) that are (in, out).
    """

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    stacked_inputs: bool = False

    @property
    def stored(self) -> str:
        """Name on the disk; the first, where there are several."""
        return self.pieces[0].tensor


class Places:
    """Finds tensors of a checkpoint by the names that an adapter gives them."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.notes: list[str] = []
        self._loaded: Loaded | None = None
        self._is_looked_up = False

    @property
    def loaded(self) -> Loaded | None:
        """The model as transformers loads it. It takes seconds, so only names that do not match directly need it."""
        if not self._is_looked_up:
            self._is_looked_up = True
            mapping = self.adapter.config.get("auto_mapping")
            named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
            tensors = self.checkpoint.tensors
            self._loaded = how_loaded(self.checkpoint.config, tensors) or how_loaded(
                self.checkpoint.config, tensors, named
            )
        return self._loaded

    def find(self, wanted: Sequence[str], known: Mapping[str, str]) -> dict[str, Place]:
        """The place of each tensor.

        Args:
            known: tensors whose names on the disk are clear already: a tied head.

        Raises:
            CheckpointError: some are not in the checkpoint, or are made of it by more than moving rows.
        """
        places = {}
        for name in wanted:
            stored = known.get(name, name)
            if stored in self.checkpoint.tensors:
                places[name] = self._whole(name, stored)
        rest = [name for name in wanted if name not in places]
        if rest and self.loaded is not None:
            for name in rest:
                if name in self.loaded.obscure:
                    raise CheckpointError(
                        f"{self.adapter.path}: {name}: transformers makes it of other tensors of "
                        f"{self.checkpoint.path} ({self.loaded.obscure[name]}), in a way that cannot be folded here. "
                        "Fold it with PEFT's merge_and_unload and name the result."
                    )
                if name in self.loaded.pieces:
                    places[name] = self._in_memory(name, self.loaded)
            rest = [name for name in rest if name not in places]
        for name, stored in self._by_prefixes(rest).items():
            places[name] = self._whole(name, stored)
        rest = [name for name in rest if name not in places]
        if rest:
            first = next(iter(self.checkpoint.tensors), "no tensors")
            raise CheckpointError(
                f"{self.adapter.path}: {some(rest)}: not in {self.checkpoint.path}, which has for example {first}."
                f"{self.trained_on()} Name the base model that the adapter was trained on."
            )
        self._mention(places.values())
        return places

    def parameter(self, module: str, depth: int) -> Place:
        """The parameter of a module to which factors at this depth belong (target_parameters).

        PEFT wraps them in the order in which the module's class has them, so that the first lies deepest.
        """
        loaded = self.loaded
        if loaded is None or module not in loaded.own:
            raise CheckpointError(
                f"{self.adapter.path}: {module}: which of its parameters is adapted (target_parameters) only "
                f"transformers' class can tell, and {'it has no such module' if loaded else 'it is not known'}."
                f"{self.trained_on()} Fold it with PEFT's merge_and_unload and name the result."
            )
        wanted = self.adapter.config.get("target_parameters") or ()
        own = [f"{module}.{name}" for name in loaded.own[module]]
        adapted = [name for name in own if any(f".{name}".endswith(f".{key}") for key in wanted)]
        if depth >= len(adapted):
            raise CheckpointError(
                f"{self.adapter.path}: {module}: target_parameters name {len(adapted)} of its parameters, and the file "
                "has factors for more. Save the adapter again."
            )
        name = adapted[len(adapted) - 1 - depth]
        return replace(self.find([name], {})[name], stacked_inputs=module in loaded.transposed)

    def trained_on(self) -> str:
        return f" The adapter was trained on {self.adapter.base_name}." if self.adapter.base_name else ""

    def _whole(self, name: str, stored: str) -> Place:
        shape = self.checkpoint.tensors[stored].shape
        return Place(name, shape, (whole_piece(stored, shape),))

    def _in_memory(self, name: str, loaded: Loaded) -> Place:
        # a checkpoint with other rows than its config says, an embedding that was resized, counts as it is
        pieces = loaded.pieces[name]
        if len(pieces) == 1 and pieces[0] == whole_piece(
            pieces[0].tensor, self.checkpoint.tensors[pieces[0].tensor].shape
        ):
            return self._whole(name, pieces[0].tensor)
        return Place(name, loaded.shapes[name], pieces)

    def _by_prefixes(self, names: Sequence[str]) -> dict[str, str]:
        """Names on the disk that differ by a prefix: one change for all, else one for each tower."""
        towers: dict[str, list[str]] = {}
        for name in names:
            towers.setdefault(_before_number(name), []).append(name)
        found: dict[str, str] = {}
        is_one = bool(names) and find_prefix(names, self.checkpoint.tensors) is not None
        for tower in [names] if is_one else towers.values():
            change = find_prefix(tower, self.checkpoint.tensors)
            if change is not None:
                found |= {name: change[1] + name.removeprefix(change[0]) for name in tower}
        return found

    def _mention(self, places: Iterable[Place]) -> None:
        """A note for each prefix that differs."""
        for place in places:
            ours, theirs = place.name.split("."), place.stored.split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours, theirs = ours[:-1], theirs[:-1]
            if not any(part.isdecimal() for part in (*ours, *theirs)) and (ours or theirs):
                before, after = ("".join(f"{part}." for part in parts) for parts in (ours, theirs))
                found = f'"{before}" where those of the model start with "{after}"'
                said = f"{self.adapter.path}: its names start with {found}"
                if said not in self.notes:
                    self.notes.append(said)


def tied_groups(places: Places, wanted: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Tensors that share their numbers, by their names on the disk; one that is not stored by its name in memory.

    transformers is asked where an adapter changes anything outside the layers; of a model that it does not know, the
    embedding and the head are a group if the config says so.
    """
    tensors, config = places.checkpoint.tensors, places.checkpoint.config
    if all(any(part.isdecimal() for part in name.split(".")) for name in wanted):
        return ()
    if (loaded := places.loaded) is not None:
        stored = {name: pieces[0].tensor for name, pieces in loaded.pieces.items()}
        groups: dict[str, list[str]] = {}
        for name, source in loaded.ties.items():
            groups.setdefault(source, [stored.get(source, source)]).append(stored.get(name, name))
        return tuple(tuple(group) for group in groups.values())
    embedding = next((name for name in tensors if is_embedding(name)), None)
    head = next((name for name in tensors if is_head(name)), None)
    said = says_tied(config)
    is_tied = bool(said) or (head is None and said is None)
    return ((embedding, head or "lm_head.weight"),) if embedding is not None and is_tied else ()


def find_prefix(wanted: Sequence[str], names: Mapping[str, object]) -> tuple[str, str] | None:
    """(prefix to remove, prefix to put before) that makes every wanted name one of `names`; None if not exactly one.

    Of several that do, the one that shares most of the names' parts with what it takes the place of.
    """
    parts = wanted[0].split(".")
    for depth in range(min(4, len(parts))):
        removed = "".join(f"{part}." for part in parts[:depth])
        rest = wanted[0].removeprefix(removed)
        fits = []
        for name in names:
            added = name.removesuffix(rest)
            if name.endswith(rest) and (not added or added.endswith(".")):
                changed = [added + each.removeprefix(removed) for each in wanted]
                if len(set(changed)) == len(wanted) and all(each in names for each in changed):
                    fits.append(added)
        if fits:
            shared = [len({*added.split(".")} & {*parts[:depth]} - {"", "model"}) for added in fits]
            best = [added for added, count in zip(fits, shared, strict=True) if count == max(shared)]
            return (removed, best[0]) if len(best) == 1 else None
    return None


def _before_number(name: str) -> str:
    """The tower's part of a name: everything before the first number, or all but the last part."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), max(0, len(parts) - 2))
    return ".".join(parts[:place])
