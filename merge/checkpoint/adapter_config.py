"""adapter_config.json: which settings can be folded, and the scaling of each module.

Source: peft 0.21.2, tuners/lora/config.py, tuners/lora/layer.py (update_layer), utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from merge.errors import CheckpointError
from merge.quoting import quoted

# Settings under which W + scaling · B·A is not the model that was trained. None, False, [] and {} are off.
_REFUSED = {
    "lora_bias": "a bias inside lora_B",
    "target_parameters": "adapters on parameters instead of modules",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which applies from some tokens on",
    "arrow_config": "a router over adapters",
    "kasa_config": "KaSA, which changes the base's weights too",
    "monteclora_config": "sampled adapters",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QA-LoRA, whose A is applied to pooled inputs",
}
# Initialisations that leave the base's weights as they are. The others move a part of them into the adapter.
_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_FOLD = "Fold it with PEFT's merge_and_unload and name the result."


def check_config(path: str, config: Mapping[str, Any]) -> None:
    """Refuses adapters that cannot be folded exactly.

    Raises:
        CheckpointError: naming the setting.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type: expected LORA, found {quoted(kind)}. Of PEFT's adapters only LoRA (with rsLoRA and "
            f"DoRA) can be used. {_FOLD}"
        )
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {key}: {meaning}, which cannot be folded here. {_FOLD}")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights: {quoted(init)} also changed the base model's weights, so this adapter does "
            "not fit the base as it is published. Save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r: expected a whole number above 0, found {quoted(rank, 40)}.")
    if not _is_number(alpha):
        raise CheckpointError(f"{path}: lora_alpha: expected a number, found {quoted(alpha, 40)}.")
    _check_pattern(path, config, "rank_pattern", lambda value: type(value) is int and value > 0)
    _check_pattern(path, config, "alpha_pattern", _is_number)


def scaling_of(path: str, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling of a module; patterns are tried in their order, and the first that matches its end wins."""
    rank: int = _by_pattern(path, config, "rank_pattern", module, config["r"])
    alpha: float = _by_pattern(path, config, "alpha_pattern", module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(path: str, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f'{path}: {key}: "{pattern}" is not a regular expression ({error}).') from None
    return default


def _check_pattern(path: str, config: Mapping[str, Any], key: str, is_right: Any) -> None:
    pattern = config.get(key)
    if pattern is None:
        return
    if not isinstance(pattern, Mapping) or not all(is_right(value) for value in pattern.values()):
        raise CheckpointError(f"{path}: {key}: expected module names with a number each, found {quoted(pattern, 60)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
