"""Continues an adapter: reads its settings and its base, and loads it into the base for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config import from_record
from finetune.keys import Config
from finetune.record import MANIFEST
from merge.checkpoint.files import read_json
from merge.errors import CheckpointError, UsageError, first_line
from merge.loading import adapter_settings, adapter_weights, bottleneck, load_adapter

if TYPE_CHECKING:
    from torch.nn import Module

_PEFT = "adapter_config.json"
_TYPES = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


def adapter_defaults(folder: Path) -> dict[str, Any]:
    """The recorded config keys that this adapter was trained with; always at least its kind and base.

    Raises:
        CheckpointError: not an adapter, or one that cannot be continued.
    """
    kept: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        record = _json(folder / MANIFEST)
        try:
            trained = from_record(record.get("config", {}))
        except ValueError as error:
            raise CheckpointError(f"{folder / MANIFEST}: no record of a training ({error}).") from None
        kept = {name: value for name, value in vars(trained).items() if value is not None}
        if record.get("labels"):  # as many as its head has
            kept["labels"] = tuple(record["labels"])
    for name in ("out", "adapter", "new_tokens"):
        kept.pop(name, None)
    return {**kept, **_what_it_is(folder, kept.get("train")), "adapter": str(folder)}


def _what_it_is(folder: Path, trained_as: str | None) -> dict[str, Any]:
    if (folder / bottleneck.CONFIG).is_file():
        return {"train": "bottleneck", "model": _json(folder / bottleneck.CONFIG).get("base_model_name_or_path", "")}
    if not (folder / _PEFT).is_file():
        raise CheckpointError(f"{folder}: not an adapter: there is neither {_PEFT} nor {bottleneck.CONFIG}.")
    settings = _json(folder / _PEFT)
    kind = _TYPES.get(str(settings.get("peft_type")))
    if settings.get("prefix_projection") or settings.get("peft_type") == "P_TUNING":
        raise CheckpointError(
            f"{folder}: a prompt encoder cannot be continued: PEFT saves the prompt that it computes, not the "
            "encoder that was trained. Train with all the data, or use train: prompt, or prefix without encoder_hidden."
        )
    if kind is None:
        raise CheckpointError(
            f"{folder}: {settings.get('peft_type')} is an unknown kind of adapter. These can be continued: "
            f"{', '.join(_TYPES.values())}, bottleneck."
        )
    if kind == "lora" and trained_as == "qlora":
        kind = "qlora"
    return {"train": kind, "model": settings.get("base_model_name_or_path") or ""}


def put_adapter(model: Module, config: Config) -> Module:
    """The base with the adapter, which alone is trained."""
    folder = Path(config.adapter or "")
    if config.train == "bottleneck":
        return bottleneck.load_bottlenecks(model, folder)
    from peft import get_peft_model, prepare_model_for_kbit_training
    from peft.utils.save_and_load import set_peft_model_state_dict

    if config.train == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        if config.train not in ("prompt", "prefix"):
            return load_adapter(model, str(folder), trainable=True)
        # PEFT cannot load a learnt prompt for training, but its file holds exactly what was trained.
        settings = adapter_settings(str(folder))
        settings.inference_mode = False
        if config.train == "prompt":
            settings.prompt_tuning_init = "RANDOM"  # not initialised from a text again
        tuned = get_peft_model(model, settings)
        set_peft_model_state_dict(tuned, adapter_weights(str(folder)))
        return tuned
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"{folder}: does not fit {config.model}: {first_line(error)} Give the base it was trained on: --model."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    return read_json(str(path), unique=False)
