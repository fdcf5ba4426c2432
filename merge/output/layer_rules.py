"""Rules by which configs describe layers with a number (every 6th, the first 3), and their forms as lists.

What each number means, and which list takes its place, is as transformers 5 reads it: the configuration_*.py files of
the architectures named here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Section = dict[str, Any]
_FULL, _WINDOW, _LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Rule:
    """One property.

    Attributes:
        name: as messages call it.
        numbers: keys whose numbers say it.
        lists: keys that say it layer by layer; with those, no note is needed.
        usual: of the layers of a config that says nothing, beside one that does.
        values: (section, layers) -> the property of each layer; None if the section says nothing of it.
        write: puts it into a section; False if the architecture cannot read it in that order.
    """

    name: str
    numbers: tuple[str, ...]
    lists: tuple[str, ...]
    usual: Any
    values: Callable[[Section, int], list[Any] | None]
    write: Callable[[Section, list[Any]], bool]


# layer_types: which kind of attention. Every k-th is full where nothing else is written:
_EVERY = {
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma"), 2),
    **dict.fromkeys(("cohere2", "exaone4", "olmo3", "afmoe"), 4),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), 5),
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma4", "gemma4_text"), 6),
}
_LINEAR_EVERY = dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), 4)
_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
_TYPE_KEYS = (*_PATTERN_KEYS, "global_attn_every_n_layers", "max_window_layers")


def _types(section: Section, n: int) -> list[object] | None:
    kind = section.get("model_type", "")
    if isinstance(section.get("layer_types"), list):
        return list(section["layer_types"])
    pattern = section.get("sliding_window_pattern", section.get("_sliding_window_pattern"))
    if isinstance(pattern, str) and pattern:  # EXAONE: "LLLG"
        return [_WINDOW if pattern[i % len(pattern)] == "L" else _FULL for i in range(n)]
    linear = section.get("full_attention_interval") or _LINEAR_EVERY.get(kind)
    if linear:
        return [_LINEAR if (i + 1) % linear else _FULL for i in range(n)]
    every = section.get("global_attn_every_n_layers")
    if kind.startswith("modernbert"):
        return [_WINDOW if i % (every or 3) else _FULL for i in range(n)]
    every = pattern or every or _EVERY.get(kind)
    if isinstance(every, int) and every > 0 and not (kind == "exaone4" and section.get("sliding_window") is None):
        return [_WINDOW if (i + 1) % every else _FULL for i in range(n)]
    return _types_from(section, kind, n)


def _types_from(section: Section, kind: str, n: int) -> list[object] | None:
    """Qwen: a window from layer max_window_layers on."""
    first = section.get("max_window_layers")
    asked = section.get("use_sliding_window", kind == "dots1")
    if not isinstance(first, int) or not asked or not section.get("sliding_window"):
        return None
    if kind == "qwen2_moe":  # there in every other layer before
        return [_WINDOW if (i + 1) % 2 and i < first else _FULL for i in range(n)]
    return [_WINDOW if i >= first else _FULL for i in range(n)]


def _write_types(section: Section, values: list[object]) -> bool:
    section["layer_types"] = values
    for key in (*_PATTERN_KEYS, "global_attn_every_n_layers"):  # untrue now; max_window_layers has a default anyway
        section.pop(key, None)
    return True


# no_rope_layers: 0 for layers without rotary positions (SmolLM3, Llama 4).


def _ropes(section: Section, n: int) -> list[object] | None:
    listed, every = section.get("no_rope_layers"), section.get("no_rope_layer_interval")
    if isinstance(listed, list) and listed:
        return list(listed)
    if every is None and section.get("model_type") in ("smollm3", "llama4_text"):
        every = 4
    return [int((i + 1) % every != 0) for i in range(n)] if every else None


def _write_ropes(section: Section, values: list[object]) -> bool:
    section["no_rope_layers"] = values
    return True


# Which layers have a dense MLP in a mixture of experts: in Qwen by step and by number ...


def _dense_by_step(section: Section, n: int) -> list[object] | None:
    step, listed = section.get("decoder_sparse_step"), section.get("mlp_only_layers")
    if (not step and listed is None) or not section.get("num_experts", 1):
        return None
    return [i in (listed or ()) or (i + 1) % (step or 1) != 0 for i in range(n)]


def _write_dense_by_step(section: Section, values: list[object]) -> bool:
    section["decoder_sparse_step"] = 1
    section["mlp_only_layers"] = [i for i, dense in enumerate(values) if dense]
    return True


# ... in DeepSeek and its kin the first ones, or as mlp_layer_types lists them ...
_READ_MLP_TYPES = (
    *("axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v32", "exaone_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "kimi_linear", "laguna", "mimo_v2_flash", "dots3_note", "mistral_large4"),
)


def _dense_first(section: Section, n: int) -> list[object] | None:
    if isinstance(section.get("mlp_layer_types"), list):
        return list(section["mlp_layer_types"])
    first, every = section.get("first_k_dense_replace"), section.get("moe_layer_freq") or 1
    if not isinstance(first, int) or not isinstance(every, int):
        return None
    return ["dense" if i < first or i % every else "sparse" for i in range(n)]


def _write_dense_first(section: Section, values: list[object]) -> bool:
    if isinstance(section.get("mlp_layer_types"), list) or section.get("model_type") in _READ_MLP_TYPES:
        section["mlp_layer_types"] = values
        section.pop("first_k_dense_replace", None)
        return True
    section["first_k_dense_replace"] = first = [*values, "sparse"].index("sparse")
    if "dense" in values[first:]:
        return False
    if section.get("moe_layer_freq"):
        section["moe_layer_freq"] = 1
    return True


# ... in Llama 4 every k-th has experts ...


def _experts_listed(section: Section, n: int) -> list[object] | None:
    listed, every = section.get("moe_layers"), section.get("interleave_moe_layer_step")
    if isinstance(listed, list):
        return [i in listed for i in range(n)]
    return [i % every == every - 1 for i in range(n)] if every else None


def _write_experts_listed(section: Section, values: list[object]) -> bool:
    section["moe_layers"] = [i for i, sparse in enumerate(values) if sparse]
    return True


# ... in ERNIE those from one layer to another.


def _experts_between(section: Section, n: int) -> list[object] | None:
    first, last = section.get("moe_layer_start_index"), section.get("moe_layer_end_index", -1)
    every = section.get("moe_layer_interval") or 1
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    last = n - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % every == 0 for i in range(n)]


def _write_experts_between(section: Section, values: list[object]) -> bool:
    if True not in values or (section.get("moe_layer_interval") or 1) != 1:
        return False
    first, last = values.index(True), len(values) - 1 - values[::-1].index(True)
    section["moe_layer_start_index"], section["moe_layer_end_index"] = first, last
    return all(values[first : last + 1])


# Jamba: no list takes the place of its periods.


def _periodic(period: str, offset: str) -> Callable[[Section, int], list[Any] | None]:
    def values(section: Section, n: int) -> list[object] | None:
        every = section.get(period)
        return [i % every == section.get(offset, 0) for i in range(n)] if isinstance(every, int) and every else None

    return values


def _cannot(section: Section, values: list[object]) -> bool:
    return False


# GPT-Neo: [[["global", "local"], 12]].


def _neo(section: Section, n: int) -> list[object] | None:
    kinds = section.get("attention_types")
    return [kind for some, times in kinds for _ in range(times) for kind in some] if isinstance(kinds, list) else None


def _write_neo(section: Section, values: list[object]) -> bool:
    section["attention_types"] = [[values, 1]]
    if "attention_layers" in section:
        section["attention_layers"] = list(values)
    return True


# Gemma 3n and 4: the last layers take keys and values of earlier ones.


def _shared(section: Section, n: int) -> list[object] | None:
    last = section.get("num_kv_shared_layers")
    return [i >= n - last for i in range(n)] if isinstance(last, int) else None


def _write_shared(section: Section, values: list[Any]) -> bool:
    n = sum(values)
    section["num_kv_shared_layers"] = n
    return n < len(values) and all(values[len(values) - n :])


RULES = (
    Rule("layer_types", _TYPE_KEYS, ("layer_types",), _FULL, _types, _write_types),
    Rule("no_rope_layers", ("no_rope_layer_interval",), ("no_rope_layers",), 1, _ropes, _write_ropes),
    Rule(
        *("dense layers", ("decoder_sparse_step", "mlp_only_layers"), (), False),
        values=_dense_by_step,
        write=_write_dense_by_step,
    ),
    Rule(
        *("dense layers", ("first_k_dense_replace", "moe_layer_freq"), ("mlp_layer_types",), "sparse"),
        values=_dense_first,
        write=_write_dense_first,
    ),
    Rule(
        *("layers with experts", ("interleave_moe_layer_step",), ("moe_layers",), True),
        values=_experts_listed,
        write=_write_experts_listed,
    ),
    Rule(
        *("layers with experts", ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), (), True),
        values=_experts_between,
        write=_write_experts_between,
    ),
    Rule(
        *("layers with attention", ("attn_layer_period", "attn_layer_offset"), (), True),
        values=_periodic("attn_layer_period", "attn_layer_offset"),
        write=_cannot,
    ),
    Rule(
        *("layers with experts", ("expert_layer_period", "expert_layer_offset"), (), False),
        values=_periodic("expert_layer_period", "expert_layer_offset"),
        write=_cannot,
    ),
    Rule("attention_types", ("attention_types",), (), "global", _neo, _write_neo),
    Rule("layers that share keys and values", ("num_kv_shared_layers",), (), False, _shared, _write_shared),
)
RULED = frozenset(key for rule in RULES for key in (*rule.numbers, *rule.lists)) | {"attention_layers"}
