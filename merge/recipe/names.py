"""The keys of each level of a recipe, and suggestions for unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from merge.methods.registry import Method
from merge.recipe.model import ALIGN, COMPAT
from merge.schema.document import FileKind
from merge.schema.keys import Key
from merge.schema.names import MOST, alike, nearest, suggest

RECIPE = FileKind(
    *("recipe", "merge_method: linear", "merge_method and models"),
    several="this is a pipeline; read it with load_pipeline or parse_pipeline",
)
_SEED = Key("int", low=0, high=(1 << 64) - 1)
_COMPAT = Key("str", choices=COMPAT)
_TEXT, _FLAG = Key("str"), Key("bool")


def _own(*keys: str) -> dict[str, Key]:
    """Keys that are read by functions of merge/recipe."""
    return dict.fromkeys(keys, Key())


# Level -> its keys.
KEYS: dict[str, dict[str, Key]] = {
    "recipe": {
        **_own("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
        **_own("tokenizer_source", "tokenizer", "chat_template", "name"),
        "seed": _SEED,
        **_own("allow"),
        "align": Key("str", choices=ALIGN, noun="way to align"),
        **_own("upscale", "config_donor", "tokenizer_donor"),
        "compat": _COMPAT,
    },
    "mixture": {
        **_own("base_model", "experts", "shared_experts", "gate_mode"),
        "experts_per_token": Key("int", low=1),
        **_own("architecture", "attention", "reinit", "dtype", "out_dtype", "name"),
        "seed": _SEED,
        **_own("allow"),
        "compat": _COMPAT,
    },
    "expert": {
        **_own("source_model", "positive_prompts", "negative_prompts"),
        "noise_scale": Key("float", low=0),
        "residual_scale": Key("float"),
    },
    "attention": {"merge_method": _TEXT, **_own("parameters")},
    "reinit": {"ratio": Key("float", low=0, high=1)},
    "model": {**_own("model", "parameters"), "statistics": _TEXT},
    "slice": _own("sources", "merge_method", "base_model", "parameters"),
    "source": {**_own("model", "layer_range", "parameters"), "statistics": _TEXT},
    "module": _own("slices", "models", "merge_method", "parameters"),
    "upscale": {
        "overlap": Key("int", low=0),
        "layers": Key("int", low=2),
        "insert_every": Key("int", low=1),
        "zero_init": _FLAG,
    },
    "tokenizer": {**_own("source", "tokens"), "pad_to_multiple_of": Key("int", low=1, high=1 << 20)},
    "token": {**_own("source"), "force": _FLAG},
    "token source": {
        "kind": Key("str", choices=("model_token", "zero")),
        **_own("model", "token"),
        "token_id": Key("int", low=0),
    },
    "condition": _own("filter", "value"),
    "reference": {**_own("model", "lora"), "override_architecture": _TEXT},
    "model path": {"path": _TEXT, "revision": _TEXT},
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


# Parameters of mergekit, or of scripts around it, that real recipes give to any method.
_FOREIGN = ("allow_negative_weights", "smooth", "rank", "residual_weight")


def is_ignored_elsewhere(key: str, known: Sequence[str], methods: Mapping[str, Method]) -> bool:
    """Whether an unknown key is one that mergekit passes over, and not a misspelt one of those known here."""
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
