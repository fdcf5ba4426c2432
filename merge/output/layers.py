"""Adapts per-layer values of a config to rearranged layers: counts, lists, lists of indices, patterns.

A list with one entry for each layer takes each layer's entry along; a list of layer numbers is renumbered. A rule
that gives every k-th layer another kind is kept where it still describes the layers. Where it does not, the layers are
listed one by one if the architecture can read that, and otherwise the recipe is refused: a config that is not true to
the weights loads and computes nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from merge.architecture import LAYER_COUNT_KEYS, architecture_of
from merge.errors import CheckpointError, Problem, RecipeError, first_line
from merge.output.layer_rules import RULED, RULES, Rule, Section
from merge.quoting import quoted

# For each output layer: its source's directory and config, and the layer's number there.
LayerOrigins = Sequence[tuple[str, dict[str, Any], int]]


@dataclass(frozen=True)
class Restacked:
    """A rebuilt stack. `module` is its name in merge.jobs.stacks.modules, `n_old` the donor's layer count."""

    module: str
    n_old: int
    origins: LayerOrigins


def restack(config: dict[str, Any], stack: Restacked) -> list[str]:
    """Changes the config in place; returns notes on rules that became lists.

    Raises:
        CheckpointError: a source's config lacks the entry of a layer that is used.
        RecipeError: this architecture's config cannot express the kinds of these layers.
    """
    section = section_of(config, stack.module)
    origins = [(path, section_of(other, stack.module), number) for path, other, number in stack.origins]
    old, n = dict(section), len(origins)
    counts = _set_counts(config, section, stack, n)
    if stack.module in ("encoder", "decoder") and section is config:
        return []  # no such config has lists for single layers, and none would say which side it means
    for key in _INDICES:
        _renumber(section, origins, key)
    _renumber_exceptions(section, origins)
    section.update({key: 0 for key in _PREDICTION_LAYERS if section.get(key)})  # a stack is made without them
    fixed = architecture_of(config).fixed_lists
    for key, value in old.items():
        if key in counts or key in RULED or key in _INDICES or key in fixed or _is_no_list_of_layers(key):
            continue
        if isinstance(value, list) and len(value) == stack.n_old:
            section[key] = [_entry(path, key, other.get(key, value), number) for path, other, number in origins]
        elif isinstance(value, str) and key in _STRINGS and len(value) == stack.n_old:
            section[key] = "".join(
                _entry(path, key, list(other.get(key, value)), number) for path, other, number in origins
            )
    notes = [note for rule in RULES if (note := _apply_checked(rule, section, old, origins)) is not None]
    if section is not config and stack.module in ("default", "text_decoder"):
        # Qwen2.5-VL and others repeat the text model's values outside its section.
        config.update({key: section[key] for key in old if key in section and config.get(key, old) == old[key]})
    if section.get("scale_attn_by_inverse_layer_idx"):
        notes.append("config.json: scale_attn_by_inverse_layer_idx: layers that moved scale their attention otherwise")
    return notes


def section_of(config: dict[str, object], module: str) -> Section:
    """The section of a config for a module."""
    for path in _SECTIONS.get(module, _SECTIONS["text_decoder"]):
        part: Any = config
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and part:
            return part
    return config


_SECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text_decoder": (("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config")),
    "vision_tower": (("vision_config",), ("thinker_config", "vision_config")),
    "audio_tower": (("audio_config",), ("thinker_config", "audio_config")),
    "encoder": (("encoder",),),
    "decoder": (("decoder",),),
}
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")


def _set_counts(config: dict[str, object], section: Section, stack: Restacked, n: int) -> set[str]:
    """Writes the number of layers under every key for it; returns these keys."""
    if section is not config or stack.module not in ("encoder", "decoder"):
        keys = {key for key in LAYER_COUNT_KEYS if section.get(key) == stack.n_old and key in section}
    elif stack.module == "encoder":
        if "num_layers" in config:  # T5 takes it for the decoder too where that has no number of its own
            config.setdefault("num_decoder_layers", config["num_layers"])
        keys = {key for key in _ENCODER_COUNTS if config.get(key) == stack.n_old}
    else:
        keys = {key for key in _DECODER_COUNTS if key in config} or {"num_decoder_layers"}
    section.update(dict.fromkeys(keys, n))
    return keys


# Lists.

_NOT_BY_LAYER = ("architectures", "mrope_section", "rope_scaling", "auto_map", "time_step_limit")
_EXCEPTIONS = "per_layer_config"
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
_STRINGS = ("hybrid_override_pattern",)  # Nemotron-H: a letter for each layer
# Lists of the numbers of some layers.
_INDICES = (
    *("cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"),
    *("global_attn_layers", "global_attn_indexes", "fullatt_block_indexes", "window_block_indices"),
)


def _is_no_list_of_layers(key: str) -> bool:
    """A list that may happen to be as long as there are layers."""
    return key in _NOT_BY_LAYER or key.endswith(("token_id", "token_ids", "tokens", "_index", "_indexes"))


def _entry(path: str, key: str, values: Any, layer: int) -> Any:
    if not isinstance(values, list) or layer >= len(values):
        raise CheckpointError(
            f"{path}/config.json: {key}: expected a list with one value for each layer, up to layer {layer}, "
            f"found {quoted(values, 60)}. Correct the file."
        )
    return values[layer]


def _renumber(section: Section, origins: Sequence[tuple[str, Section, int]], key: str) -> None:
    if any(isinstance(other.get(key), list) for _, other, _ in origins):
        section[key] = [place for place, (_, other, number) in enumerate(origins) if number in (other.get(key) or ())]


def _renumber_exceptions(section: Section, origins: Sequence[tuple[str, Section, int]]) -> None:
    """Gemma 4: what differs in some layers, {"05": {"head_dim": 512}}, by the layer's number."""
    known = [{int(key): value for key, value in (other.get(_EXCEPTIONS) or {}).items()} for _, other, _ in origins]
    if any(known):
        width = len(str(len(origins) - 1))
        section[_EXCEPTIONS] = {
            f"{place:0{width}}": found[number]
            for place, ((_, _, number), found) in enumerate(zip(origins, known, strict=True))
            if number in found
        }


# Rules.


def _apply_checked(
    rule: Rule, section: Section, old: Section, origins: Sequence[tuple[str, Section, int]]
) -> str | None:
    """Like _apply; a config in none of the forms that the rule knows is reported as an error."""
    try:
        return _apply(rule, section, old, origins)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        said = f"{rule.name}: cannot be read as a rule for layers ({first_line(error)})."
        raise CheckpointError(f"{origins[0][0]}: {said}") from error


def _apply(rule: Rule, section: Section, old: Section, origins: Sequence[tuple[str, Section, int]]) -> str | None:
    """Adapts a rebuilt section to one rule; returns a note if a list replaced numbers."""
    found = [rule.values(other, _count(other)) for _, other, _ in origins]
    if all(values is None for values in found):
        return None
    wanted = []
    for (path, _, number), values in zip(origins, found, strict=True):
        wanted.append(rule.usual if values is None else _entry(path, rule.name, values, number))
    if rule.values(section, len(wanted)) == wanted:
        return None
    said = ", ".join(f"{key} {quoted(old[key], 30)}" for key in rule.numbers if old.get(key) is not None)
    said = said or f"the pattern of {old.get('model_type', 'this architecture')}"
    if not rule.write(section, wanted):
        raise RecipeError(
            Problem(
                f"{rule.name}: {said} cannot describe the layers in this order, which are {_runs(wanted)}.",
                "config.json",
                "Choose ranges that keep the pattern.",
            )
        )
    if any(isinstance(old.get(key), list) for key in rule.lists):
        return None
    return f"config.json: {rule.name}: {said} does not fit the layers in this order; now {_runs(wanted)}"


def _runs(values: list[object]) -> str:
    """[a, a, b] -> "2 x a, 1 x b" """
    runs = [(value, len(list(group))) for value, group in groupby(values)]
    text = ", ".join(f"{count} x {str(value).lower()}" for value, count in runs[:6])
    return text + (", ..." if len(runs) > 6 else "")


def _count(section: Mapping[str, Any]) -> int:
    return next((section[key] for key in LAYER_COUNT_KEYS if isinstance(section.get(key), int)), 0)
