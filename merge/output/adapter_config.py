"""adapter_config.json of a merged adapter: rank and alpha are equal, so every scaling is 1.

Source of the keys and of how patterns are matched: peft 0.21.2, tuners/lora/config.py, utils/other.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from merge.adapters.files import Adapter

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def adapter_config(adapters: Sequence[Adapter], ranks: Mapping[str, int], base: str | None) -> str:
    """Text of adapter_config.json.

    Args:
        ranks: of each module of the result.
        base: name of the base model.
    """
    first = adapters[0].config
    usual = _usual(ranks) if ranks else first["r"]
    # PEFT takes the first key that matches the end of a module's name, so the longest comes first.
    others = {name: rank for name, rank in sorted(ranks.items(), key=lambda item: -len(item[0])) if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": _common(adapters, "task_type"),
        "auto_mapping": _common(adapters, "auto_mapping"),
        "base_model_name_or_path": base,
        "revision": _common(adapters, "revision"),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        **_targets(adapters, ranks),
        "lora_dropout": 0.0,
        "bias": next((one.config["bias"] for one in adapters if one.config.get("bias", "none") != "none"), "none"),
        "fan_in_fan_out": any(module.fan_in_fan_out for one in adapters for module in one.modules.values()),
        "modules_to_save": _modules_to_save(adapters),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def ranks_said(ranks: Mapping[str, int]) -> str:
    """`rank 16`, or `rank 16 (8 in 4 modules)`"""
    if not ranks:
        return "no rank"
    usual = _usual(ranks)
    others = [f"{rank} in {n}" for rank, n in sorted(Counter(ranks.values()).items()) if rank != usual]
    return f"rank {usual}" + (f" ({', '.join(others)})" if others else "")


def _usual(ranks: Mapping[str, int]) -> int:
    counts = Counter(ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


def _common(adapters: Sequence[Adapter], key: str) -> object:
    """The value that all adapters share; None if they differ."""
    first = adapters[0].config.get(key)
    return first if all(one.config.get(key) == first for one in adapters) else None


def _targets(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, object]:
    """target_modules as the adapters write it, if they agree; else the name of every module."""
    alike = all(set(one.modules) == set(ranks) for one in adapters)
    if alike and len({_targets_of(one) for one in adapters}) == 1:
        return {key: adapters[0].config.get(key) for key in _TARGETS}
    return {"target_modules": list(ranks), **dict.fromkeys(_TARGETS[1:])}


def _targets_of(adapter: Adapter) -> str:
    values = [adapter.config.get(key) for key in _TARGETS]
    return json.dumps([sorted(value, key=str) if isinstance(value, list) else value for value in values])


def _modules_to_save(adapters: Sequence[Adapter]) -> list[str] | None:
    return list(dict.fromkeys(name for one in adapters for name in one.config.get("modules_to_save") or ())) or None
