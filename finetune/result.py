"""Writes result/: the model or adapter with its tokenizer, log, loss curve, manifest and card."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from finetune.models import Base
from finetune.output import TrainingDirectory
from finetune.record import CURVE, LOG, MANIFEST, TENSORBOARD, card, draw_losses, manifest, write_json
from finetune.trainables import TRAINABLES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from finetune.prepare import Prepared
    from finetune.trainer import Tuner


def save_result(trainer: Tuner, prepared: Prepared, directory: TrainingDirectory) -> None:
    """The trained model or adapter, and its tokenizer. Sharded parameters are gathered by all processes."""
    from merge.loading.bottleneck import save_bottlenecks

    config, base = prepared.config, prepared.base
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.sharded else None
    if not directory.first:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    name = config.model if base.revision else base.path
    directory.result.mkdir()
    if config.train == "bottleneck":
        save_bottlenecks(model, directory.result, name, state)
    elif TRAINABLES[config.train].adapter:
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = name
        # New tokens have rows of their own, or modules_to_save has the embeddings: the base's need not be kept.
        model.save_pretrained(directory.result, state_dict=state, save_embedding_layers=False)
    else:
        _save_model(model, state, base, directory.result)
    base.tokenizer.save_pretrained(directory.result)
    prepared.objective.finish(directory.result, model)


def _save_model(model: nn.Module, state: dict[str, Tensor] | None, base: Base, folder: Path) -> None:
    """Converts to the base's dtype: frozen weights have the base's bits again, and recipes find one dtype."""
    import torch

    dtype = getattr(base.config, "dtype", None) or torch.float32
    if state is None:
        model.to(dtype)
    else:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        model.config.dtype = dtype
    if hasattr(base.config, "use_cache"):
        model.config.use_cache = base.config.use_cache  # Trainer turns it off for training
    model.save_pretrained(folder, state_dict=state)


def write_records(
    trainer: Tuner,
    prepared: Prepared,
    directory: TrainingDirectory,
    digests: dict[str, str],
    figures: dict[str, object],
) -> str | None:
    """Log, curve, manifest and card; a note for the user if something is left out."""
    config, result, log = prepared.config, directory.result, trainer.state.log_history
    write_json(result / LOG, log)
    note = draw_losses(log, result / CURVE, prepared.objective.unit)
    write_json(result / MANIFEST, manifest(config, prepared.base, prepared.data, digests, figures))
    adapter = TRAINABLES[config.train].adapter
    text = card(config, prepared.base, prepared.data, prepared.objective, figures, adapter)
    (result / "README.md").write_text(text, encoding="utf-8")
    if config.tensorboard:
        shutil.copytree(directory.partial / TENSORBOARD, result / TENSORBOARD)
    return note


def summarise_metrics(log: list[dict[str, float]], best: bool) -> dict[str, tuple[float, float]]:
    """Figures of the objective by name: before training, and of the kept checkpoint."""
    held_out = [entry for entry in log if "eval_loss" in entry]
    if len(held_out) < 2:
        return {}
    after = min(held_out[1:], key=lambda entry: float(entry["eval_loss"])) if best else held_out[-1]
    return {
        name.removeprefix("eval_"): (held_out[0][name], after[name])
        for name in after
        if name.startswith("eval_") and not name.startswith("eval_loss") and name in held_out[0]
    }


def summarise_losses(log: list[dict[str, float]], best: bool) -> dict[str, float | None]:
    """The figures of the card, from the log."""
    training = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "train_first": training[0] if training else None,
        "train_last": training[-1] if training else None,
        "validation_before": held_out[0] if held_out else None,
        # The first is of the untrained model, which is never kept.
        "validation": (min(held_out[1:]) if best else held_out[-1]) if len(held_out) > 1 else None,
    }
