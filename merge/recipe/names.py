"""The keys a recipe may write, and what somebody who wrote another one probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from merge.methods.registry import Method

KEYS: dict[str, tuple[str, ...]] = {
    "recipe": (
        *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
        *("tokenizer_source", "tokenizer", "chat_template", "name", "seed", "allow", "align"),
        *("upscale", "config_donor", "tokenizer_donor", "compat"),
    ),
    "mixture": (
        *("base_model", "experts", "shared_experts", "gate_mode", "experts_per_token", "architecture", "attention"),
        *("reinit", "dtype", "out_dtype", "name", "seed", "allow", "compat"),
    ),
    "expert": ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"),
    "attention": ("merge_method", "parameters"),
    "reinit": ("ratio",),
    "model": ("model", "parameters", "statistics"),
    "slice": ("sources", "merge_method", "base_model", "parameters"),
    "source": ("model", "layer_range", "parameters", "statistics"),
    "module": ("slices", "models", "merge_method", "parameters"),
    "upscale": ("overlap", "layers", "insert_every", "zero_init"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "token": ("source", "force"),
    "token source": ("kind", "model", "token", "token_id"),
    "condition": ("filter", "value"),
    "reference": ("model", "lora", "override_architecture"),
    "model path": ("path", "revision"),
}
# Keys of mergekit's schema that do nothing there: refused with the reason, not as unknown.
REFUSED: dict[str, dict[str, str]] = {
    "slice": {"residual_weight": "residual_weight has no effect in mergekit and none here; remove it"},
}
LEVELS = {
    "recipe": "the recipe",
    "mixture": "the recipe",
    "expert": 'an entry of "experts"',
    "attention": '"attention"',
    "reinit": '"reinit"',
    "model": 'an entry of "models"',
    "slice": 'an entry of "slices"',
    "source": 'an entry of "sources"',
    "module": "a module",
    "upscale": '"upscale"',
    "tokenizer": '"tokenizer"',
    "token": "a token",
    "token source": "a token's source",
    "condition": "a condition",
    "reference": "a model reference",
    "model path": "a model path",
}


_MOST = 3  # names that a message suggests
# Parameters of mergekit, or of scripts around it, that real recipes give to any method.
_FOREIGN = ("allow_negative_weights", "smooth", "rank", "residual_weight")
_LONGEST = 100  # characters: no name is so long


def suggest(word: str, names: Sequence[str]) -> str:
    """`did you mean "density"?`, or `known: a, b, c`."""
    near = nearest(word, names)
    return f'did you mean "{near}"?' if near else f"known: {', '.join(names)}"


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(alike(word, names)), None)


def alike(word: str, names: Sequence[str]) -> list[str]:
    """The names that were probably meant: letters swapped, else cut short, else alike and as much so as the nearest."""
    if len(word) > _LONGEST:
        return []
    word = _fold(word)
    for same in (lambda name: sorted(name) == sorted(word), lambda name: len(word) > 2 and name.startswith(word)):
        if found := [name for name in names if same(_fold(name))]:
            return found[:_MOST]
    ratios = {name: difflib.SequenceMatcher(None, _fold(name), word).ratio() for name in names}
    best = max(ratios.values(), default=0.0)
    near = [name for name in names if ratios[name] >= max(0.6, best - 0.05)]
    return sorted(near, key=lambda name: -ratios[name])[:_MOST]


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


def is_ignored_elsewhere(key: str, known: Sequence[str], methods: Mapping[str, Method]) -> bool:
    """Whether an unknown key is one that mergekit passes over, and not a misspelt one of those known here."""
    words = {*_FOREIGN, *(key for keys in KEYS.values() for key in keys)}
    meant = key in words or any(method.parameter(key) is not None for method in methods.values())
    return meant or nearest(key, known) is None


def unknown_key(key: str, level: str, method: Method | None) -> str:
    """A key that is right elsewhere is sent there; else the nearest name of this level."""
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
    if len(others) <= _MOST + 1:
        return ", ".join(others)
    order = [*difflib.get_close_matches(own, others, _MOST, 0.0)]
    return f"{', '.join(order)} and {len(others) - len(order)} more"
