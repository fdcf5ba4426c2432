"""Facts about a class of models: ties, names, keys that loading ignores, parameters kept in float32."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

_FLAG_KEYS = ("tie_embedding", "tie_word_embeddings")  # LFM2 uses the first, if it exists


@dataclass(frozen=True, slots=True)
class Tie:
    """A parameter that is tied to another one if the config says so.

    Attributes:
        target, source: names in the model.
        section: path in the config whose flag counts beside that at the top; "" if there is none.
        flags: "1" where the tie holds, for the flag at the top in (missing, false, true) and, for each of these, that
            of the section in the same three.
    """

    target: str
    source: str
    section: str
    flags: str

    def holds(self, config: Mapping[str, object]) -> bool:
        """Whether a model with this config.json has the tie."""
        top, part = flag_of(config), flag_of(config_section(config, self.section)) if self.section else None
        return self.flags[3 * _place(top) + _place(part)] == "1"

    @property
    def always(self) -> bool:
        """Whether the tie holds for any flag (T5)."""
        return "0" not in self.flags


@dataclass(frozen=True, slots=True)
class Rename:
    """Of a name that begins with one of `scopes`, the first match of `pattern` in the rest becomes `replacement`."""

    pattern: str
    replacement: str
    scopes: tuple[str, ...] = ("",)

    def apply(self, name: str) -> str:
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        if scope is None:
            return name
        rest = name[len(scope) :]
        match = _compiled(self.pattern).search(rest)
        if match is None:
            return name
        # The pattern's own group is the one inside the named group that matched.
        group = match.re.groupindex[match.lastgroup] + 1 if match.lastgroup else 1
        new = self.replacement
        if r"\1" in new:
            new = new.replace(r"\1", match.group(group))
        return scope + rest[: match.start()] + new + rest[match.end() :]


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A tensor outside the layers that holds one equal part for each layer, one after another along `axis`."""

    name: str
    axis: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of models. All names are those in the model; `loaded_name` leads to them from those on the disk.

    Attributes:
        name: of the class.
        prefix: of the part without a head; a checkpoint of that part alone is stored without it.
        embedding, head: the matrices of the input and the output tokens.
        ties: parameters that are one, where the config says so.
        unread: regular expressions of keys that loading ignores, or computes where they are missing.
        float32: regular expressions of what stays float32 in a bfloat16 or float16 model.
        float32_of_half: the same for float16 alone.
        renames: from names on the disk.
        stacks: what the names of the language model's layers begin with, before the number; several where a layer's
            modules lie in lists of their own (XLM: attentions, ffns).
        per_layer: tensors outside the layers with a part for each.
        first_layer: names in the first layer that the others lack, after a "+"; what it alone lacks, after a "-".
        fixed_lists: keys of lists in the config that are not one value for each layer.
    """

    name: str
    prefix: str = ""
    embedding: str | None = None
    head: str | None = None
    ties: tuple[Tie, ...] = ()
    unread: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    float32_of_half: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()
    stacks: tuple[str, ...] = ()
    per_layer: tuple[PerLayer, ...] = ()
    first_layer: tuple[str, ...] = ()
    fixed_lists: tuple[str, ...] = ()

    def loaded_name(self, name: str) -> str:
        """The name in the model of a tensor on the disk, but for `prefix`, which may be in front of one of the two."""
        for rename in self.renames:
            name = rename.apply(name)
        return name

    def parameter(self, name: str, known: Container[str]) -> str | None:
        """The parameter in `known` that a tensor on the disk is loaded into; None if there is none."""
        loaded, prefix = self.loaded_name(name), f"{self.prefix}."
        choices = (loaded, prefix + loaded, loaded.removeprefix(prefix))
        return next((choice for choice in choices if choice in known), None)

    def is_unread(self, name: str) -> bool:
        """Whether loading ignores a tensor of this name, or computes it where it is missing."""
        return any(_compiled(pattern).search(name) for pattern in (*_UNREAD, *self.unread))

    def keeps_float32(self, dtype: str) -> Callable[[str], bool]:
        """`stays_float32` for many names: asked once for those that differ only in the numbers of layers and experts,
        unless a pattern tells numbers apart. 45,000 names are of a hundred kinds."""
        texts = [*self.float32, *self.float32_of_half]
        texts += [text for rename in self.renames for text in (rename.pattern, *rename.scopes)]
        digits = b"" if any(_NUMBER.search(_GROUP_NAME.sub("", text)) for text in texts) else b"123456789"
        numbers = bytes.maketrans(digits, b"0" * len(digits))
        known: dict[bytes, bool] = {}

        def keeps(name: str) -> bool:
            kind = name.encode("utf-8", "surrogatepass").translate(numbers)
            if kind not in known:
                known[kind] = self.stays_float32(name, dtype)
            return known[kind]

        return keeps

    def stays_float32(self, name: str, dtype: str) -> bool:
        """Whether a tensor is float32 in a model that is loaded as `dtype` (safetensors' name of it)."""
        if dtype not in ("BF16", "F16"):
            return False
        patterns = (*self.float32, *(self.float32_of_half if dtype == "F16" else ()))
        if not patterns:
            return False
        loaded = self.loaded_name(name)
        return any(_compiled(pattern).search(loaded) for pattern in patterns)


# Buffers that were once stored, in any model.
_UNREAD = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_compiled = functools.lru_cache(maxsize=None)(re.compile)
# In a pattern, a number of its own or a reference to what matched; not a group's name.
_NUMBER, _GROUP_NAME = re.compile(r"\d"), re.compile(r"\(\?P<\w+>")


def flag_of(config: Mapping[str, object]) -> bool | None:
    """tie_word_embeddings of a section; None if it is missing."""
    return next((bool(config[key]) for key in _FLAG_KEYS if config.get(key) is not None), None)


def config_section(config: Mapping[str, object], path: str) -> Mapping[str, object]:
    part: Any = config
    for key in filter(None, path.split(".")):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _place(flag: bool | None) -> int:
    return 0 if flag is None else 1 + flag
