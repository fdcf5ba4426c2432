"""Config -> transformers' TrainingArguments."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import keeps_best
from finetune.keys import Config
from finetune.models import mixed_precision
from finetune.trainables import TRAINABLES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from finetune.prepare import Prepared

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def intervals(config: Config, epoch: int, steps: int) -> tuple[int, int]:
    """Steps between evaluations and between checkpoints, for a run of this many steps.

    Evaluations take place once an epoch by default, or with every checkpoint if the best one is kept: it is chosen
    among those that were evaluated, so checkpoints come at multiples of evaluations.
    """
    by_checkpoint = config.save_every if keeps_best(config) else None
    watch = min(config.eval_every or by_checkpoint or epoch, steps)
    save = config.save_every or watch
    return watch, save if save <= steps else watch * math.ceil(steps / watch)


def arguments(prepared: Prepared, device: str, folder: Path) -> TrainingArguments:
    """transformers.TrainingArguments of a config."""
    from transformers import TrainingArguments

    config, data = prepared.config, prepared.data
    world = int(os.environ.get("WORLD_SIZE", "1"))
    each = math.ceil(math.ceil(len(data.train) / (config.batch_size * world)) / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(each * config.epochs)
    watch, save = intervals(config, each, steps)
    precision = mixed_precision(config, device)
    validated = data.validation is not None
    rate = config.learning_rate or TRAINABLES[config.train].learning_rate
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        optim=_OPTIMIZERS.get(config.optimizer, config.optimizer),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validated else "no",
        eval_steps=watch if validated else None,
        save_strategy="steps",
        save_steps=save,
        load_best_model_at_end=keeps_best(config),
        metric_for_best_model="loss" if validated else None,
        greater_is_better=False if validated else None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device == "cpu",
    )
