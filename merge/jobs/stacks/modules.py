"""Modules: the towers of a model, found by the names of its tensors.

Their names are mergekit's: text_decoder, vision_tower, multi_modal_projector; encoder, decoder, shared; default for a
model that is one tower. A recipe may also name a module by what its tensors' names begin with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

from merge.architecture import Stack, find_stacks
from merge.errors import Problem
from merge.planning.inputs import Input, Inputs
from merge.quoting import counted
from merge.recipe.model import Recipe
from merge.schema.names import suggest

DEFAULT, TEXT, VISION, AUDIO = "default", "text_decoder", "vision_tower", "audio_tower"
PROJECTOR, ENCODER, DECODER, SHARED = "multi_modal_projector", "encoder", "decoder", "shared"

_ALIASES = {
    "language_model": TEXT,
    "text_model": TEXT,
    "vision_model": VISION,
    "visual": VISION,
    "audio_model": AUDIO,
    "projector": PROJECTOR,
    "connector": PROJECTOR,
}
# Parts of a model between a tower and the text model; their other tensors are in the towers.
_PROJECTORS = frozenset(
    (
        *("multi_modal_projector", "mm_projector", "connector", "projector", "merger", "deepstack_merger_list"),
        *("modality_projection", "aligner", "embed_vision", "embed_audio", "image_newline", "mlp1"),
    )
)
_VISION_PARTS = ("vision", "visual", "image_encoder", "vit")
_AUDIO_PARTS = ("audio", "speech")
SIDE_MODULES = (VISION, PROJECTOR, AUDIO)  # modules that a plain language model lacks


class Modules:
    """The modules of a model, by the names of its tensors."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        plain = [name for name in self._names if _tower(name) is None]
        self._is_pair = {ENCODER, DECODER} <= set(map(_root, plain))
        self._is_single = not self._is_pair and len(plain) == len(self._names)
        self.found = tuple(dict.fromkeys(map(self.of, self._names)))

    def of(self, name: str) -> str:
        """The module that a tensor belongs to."""
        if self._is_single:
            return DEFAULT
        tower = _tower(name)
        if tower is not None:
            return tower
        if not self._is_pair:
            return TEXT
        root = _root(name)
        return root if root in (ENCODER, SHARED) else DECODER

    def described(self) -> Iterator[str]:
        """`vision_tower (model.visual., 120 tensors)`"""
        for module in self.found:
            names = [name for name in self._names if self.of(name) == module]
            prefix = _common_prefix(names)
            yield f"{module} ({f'{prefix}*, ' if prefix else ''}{counted(len(names), 'tensor')})"


class Chosen:
    """Assigns tensors to the keys of a recipe's modules; `problems`: keys that name no module."""

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.problems: list[Problem] = []
        self._modules = inputs_modules(inputs)
        self._keys: dict[str, str] = {}  # module -> the recipe's key
        self._prefixes: list[tuple[str, str]] = []  # (prefix, the recipe's key), the longest first
        names = list(inputs.donor.tensors)
        for key in recipe.modules:
            where = recipe.where(f"modules.{key}")
            module = self._module(key)
            if module is None and any(name.startswith(f"{key}.") for name in names):
                self._prefixes.append((f"{key}.", key))
            elif module is None:
                near = suggest(key, [*self._modules.found, *_ALIASES])
                near = f" {near[0].upper()}{near[1:]}" if near.startswith("did") else ""
                has = ", ".join(self._modules.described())
                message = f'there is no module "{key}" in {inputs.donor.ref.text}, which has {has}.{near}'
                hint = None if recipe.base_model else "Name the model that has it as base_model."
                self.problems.append(Problem(message, where, hint))
            elif module in self._keys:
                self.problems.append(Problem(f'"{key}" and "{self._keys[module]}" are the same module.', where))
            else:
                self._keys[module] = key
        self._prefixes.sort(key=lambda pair: -len(pair[0]))

    def _module(self, key: str) -> str | None:
        found = self._modules.found
        if key == DEFAULT or key in found:
            return key  # default: all that no other module takes
        alias = _ALIASES.get(key, key)
        if alias in found:
            return alias
        return DEFAULT if alias == TEXT and found == (DEFAULT,) else None

    def key_of(self, name: str) -> str | None:
        """The recipe's key for the module of a tensor; None if the recipe does not list it."""
        for prefix, key in self._prefixes:
            if name.startswith(prefix):
                return key
        return self._keys.get(self._modules.of(name), self._keys.get(DEFAULT))

    def kind(self, key: str) -> str:
        """The module's known name; for a prefix, that of the tensors below it."""
        for prefix, prefixed in self._prefixes:
            if key == prefixed:
                return self._modules.of(f"{prefix}0.weight")
        return next((module for module, chosen in self._keys.items() if chosen == key), DEFAULT)

    def stack(self, key: str, model: Input) -> Stack | None:
        """The layers of a module in one model: the stack that its config confirms, else the longest one."""
        for stack in (*([model.main] if model.main else []), *model.stacks):
            if self.key_of(stack.name(0, "weight")) == key:
                return stack
        owned = [name for name in model.tensors if self.key_of(name) == key]
        return next(iter(find_stacks(owned, {})), None)


def inputs_modules(inputs: Inputs) -> Modules:
    """The modules of the donor, to which all inputs' tensors are assigned."""
    return modules_of(tuple(inputs.donor.tensors))


@functools.lru_cache(maxsize=8)
def modules_of(names: tuple[str, ...]) -> Modules:
    return Modules(names)


def side_modules(inputs: Inputs) -> Mapping[str, frozenset[int]]:
    """Towers beside the donor's text model -> the inputs without them (plain language models)."""
    modules = inputs_modules(inputs)
    lacking = {}
    for module in modules.found:
        if module in SIDE_MODULES:
            without = frozenset(
                i for i, model in enumerate(inputs.all) if all(modules.of(name) != module for name in model.tensors)
            )
            if without:
                lacking[module] = without
    return lacking


def _tower(name: str) -> str | None:
    """The module of a tensor that is not the language model's."""
    parts = name.split(".")
    if not _PROJECTORS.isdisjoint(parts):
        return PROJECTOR
    for part in takewhile(lambda part: not part.isdecimal(), parts):
        if part.startswith(_VISION_PARTS):
            return VISION
        if part.startswith(_AUDIO_PARTS):
            return AUDIO
    return None


def _root(name: str) -> str:
    """The first specific part of a name: model.decoder.layers.0 -> decoder."""
    parts = name.split(".")
    return next((part for part in parts if part not in ("model", "transformer", "language_model")), "")


def _common_prefix(names: list[str]) -> str:
    """The common prefix of all names, in whole parts."""
    common = names[0].split(".")[:-1]
    for name in names:
        parts = name.split(".")
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(common, parts, strict=False))]
    return "".join(f"{part}." for part in takewhile(lambda part: not part.isdecimal(), common))
