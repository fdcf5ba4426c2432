"""Messages for unknown keys, parameters and methods of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from merge.methods.registry import Method
from merge.recipe.keys import KEYS, LEVELS
from merge.schema.document import FileKind
from merge.schema.names import MOST, alike, nearest, suggest

RECIPE = FileKind(
    *("recipe", "merge_method: linear", "merge_method and models"),
    several="this is a pipeline; read it with load_pipeline or parse_pipeline",
)

# Parameters of mergekit, or of scripts around it, that real recipes give to any method.
_FOREIGN = ("allow_negative_weights", "smooth", "rank", "residual_weight")


def is_ignored_elsewhere(key: str, known: Sequence[str], methods: Mapping[str, Method]) -> bool:
    """Whether an unknown key is one that mergekit ignores rather than a misspelt known one."""
    words = {*_FOREIGN, *(key for keys in KEYS.values() for key in keys)}
    meant = key in words or any(method.parameter(key) is not None for method in methods.values())
    return meant or nearest(key, known) is None


def unknown_key(key: str, level: str, method: Method | None) -> str:
    """The message for an unknown key: the level that it belongs to, or the nearest key of this level."""
    known = KEYS[level]
    if "parameters" in known and method is not None and method.parameter(key) is not None:
        return f'unknown key "{key}"; it is a parameter of {method.name}: write it under "parameters"'
    near = nearest(key, known)
    elsewhere = [other for other in ("recipe", "model", "source", "slice") if key in KEYS[other] and other != level]
    if elsewhere and level in ("recipe", "model", "source", "slice", "module"):
        return f'unknown key "{key}"; it belongs to {LEVELS[elsewhere[0]]}'
    if near is None and "parameters" in known and method is not None:
        near = nearest(key, [parameter.name for parameter in method.parameters])
        if near is not None:
            return f'unknown key "{key}"; did you mean the parameter "{near}"? Write it under "parameters"'
    return f'unknown key "{key}"; {suggest(key, known)}'


def unknown_parameter(key: str, in_use: Sequence[Method], methods: Mapping[str, Method]) -> str:
    known = list(dict.fromkeys(parameter.name for method in in_use for parameter in method.parameters))
    near = nearest(key, known)
    others = [name for name, other in methods.items() if other.parameter(key) is not None]
    if others:
        own = " and ".join(method.name for method in in_use)
        which = "which has" if len(in_use) == 1 else "which have"
        return f'"{key}" is a parameter of {_few(others, own)}, not of {own}, {which}: {", ".join(known) or "none"}'
    if near is None and key in KEYS["recipe"]:
        return f'unknown key "{key}"; it belongs to the recipe, not under "parameters"'
    return f'unknown key "{key}"; {suggest(key, known)}'


def unknown_method(name: str, methods: Mapping[str, Method]) -> str:
    near = [f'"{other}"' for other in alike(name, list(methods))]
    hint = f"did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}? " if near else ""
    return f'unknown method "{name}"; {hint}{ALL_METHODS}'


ALL_METHODS = "`merge methods` lists them all"


def _few(others: Sequence[str], own: str) -> str:
    """`dare_ties, ties and 7 more`: those whose names are most like the method's own first."""
    if len(others) <= MOST + 1:
        return ", ".join(others)
    order = [*difflib.get_close_matches(own, others, MOST, 0.0)]
    return f"{', '.join(order)} and {len(others) - len(order)} more"
