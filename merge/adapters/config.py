"""Checks adapter_config.json: the kinds and settings that can be folded, and the scaling of each module.

Source: peft 0.21.2, tuners/lora/config.py, tuners/lora/layer.py (update_layer).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from merge.adapter_kinds import KINDS
from merge.adapter_kinds.patterns import by_pattern, is_number
from merge.checkpoint.files import FINETUNE_RECORD, read_json
from merge.errors import CheckpointError
from merge.quoting import quoted

# Kinds besides LoRA and merge.adapter_kinds that consist of whole tensors, or of rows of an embedding.
_WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")
# Kinds that change a model's input or how it runs, which no weights can represent.
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
)
_ROUTERS = ("XLORA", "POLY")
# Settings under which W + scaling · B·A is not the model that was trained. None, False, [] and {} are off.
_REFUSED = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which applies from some tokens on",
    "arrow_config": "a router over adapters",
    "kasa_config": "KaSA, which changes the base's weights too",
    "monteclora_config": "sampled adapters",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QA-LoRA, whose A is applied to pooled inputs",
}
# Initialisations that do not change the base's weights.
_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
# Initialisations that moved a part of the base's weights into the adapter and can be reconstructed.
_PARTED = {"pissa": "svd", "olora": "qr"}
_FOLD = "Fold it with PEFT's merge_and_unload and name the result."


def check_config(path: str, config: Mapping[str, object]) -> None:
    """Refuses adapters that cannot be folded exactly.

    Raises:
        CheckpointError: naming the setting.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in ("LORA", *_WHOLE, *KINDS):
        raise CheckpointError(f"{path}: {_why_not(kind)}")
    if kind != "LORA":
        return
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {key}: {meaning}, which cannot be folded here. {_FOLD}")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in (*_INITS, *_PARTED):
        raise CheckpointError(
            f"{path}: init_lora_weights: {quoted(init)} also changed the base model's weights, so this adapter does "
            "not fit the base as it is published. Save it again with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r: expected a whole number above 0, found {quoted(rank, 40)}.")
    if not is_number(alpha):
        raise CheckpointError(f"{path}: lora_alpha: expected a number, found {quoted(alpha, 40)}.")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(f"{path}: modules_to_save: expected names of modules, found {quoted(saved, 40)}.")
    _check_pattern(path, config, "rank_pattern", lambda value: type(value) is int and value > 0)
    _check_pattern(path, config, "alpha_pattern", is_number)


def _why_not(kind: object) -> str:
    """Why a kind is not folded, and what to do."""
    if kind in _PROMPTS:
        return (
            f"peft_type: {kind} changes what the model reads, not its weights; it cannot be folded. Use it with PEFT."
        )
    if kind in _ROUTERS:
        return f"peft_type: {kind} chooses among adapters by the input; it cannot be folded. Use it with PEFT."
    known = ", ".join(("LORA", *KINDS, *_WHOLE))
    return f"peft_type: expected one of {known}; found {quoted(kind, 40)}. {_FOLD}"


def base_part(config: Mapping[str, object]) -> str | None:
    """How a part of the base's weights was moved into a LoRA at its start: "svd", "qr"; None: it was not."""
    return _PARTED.get(str(config.get("init_lora_weights")).lower())


def scaling_of(config: Mapping[str, object], module: str) -> tuple[int, float]:
    """Rank and scaling of a module of a LoRA. Raises ValueError with the short cause."""
    rank = int(by_pattern(config, "rank_pattern", module, "r"))
    alpha = by_pattern(config, "alpha_pattern", module, "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_pattern(path: str, config: Mapping[str, Any], key: str, is_right: Any) -> None:
    pattern = config.get(key)
    if pattern is None:
        return
    if not isinstance(pattern, Mapping) or not all(is_right(value) for value in pattern.values()):
        raise CheckpointError(f"{path}: {key}: expected module names with a number each, found {quoted(pattern, 60)}.")


def trained_on(folder: str, config: Mapping[str, object]) -> str | None:
    """The 4-bit format of the base that the adapter was trained on (QLoRA), if its files say so; else None.

    PEFT does not record it. `merge finetune` does; others leave it in the base's name, as unsloth's "...-bnb-4bit".
    """
    record = os.path.join(folder, FINETUNE_RECORD)
    if os.path.isfile(record):
        told = read_json(record, unique=False).get("config")
        if isinstance(told, dict) and told.get("train") == "qlora":
            return "nf4" if told.get("double_quantization") is False else "nf4 --nested"
    name = str(config.get("base_model_name_or_path") or "").lower()
    return "nf4 --nested" if re.search("bnb[-_]?4bit|nf4", name) else None


def is_dequantized(folder: str) -> bool:
    """Whether `merge quantize --dequantize` wrote the model; then a QLoRA adapter was trained on these weights."""
    manifest = os.path.join(folder, "merge_manifest.json")
    if not os.path.isfile(manifest):
        return False
    return str(read_json(manifest, unique=False).get("method", "")).endswith(" dequantized")
