"""Detects the set-up of accelerate and torchrun, and refuses one that cannot train a config.

Processes are started by them; each runs the same command. The variables are those of accelerate's launcher
(accelerate/utils/launch.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from finetune.keys import Config
from merge.errors import UsageError

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes files and messages: the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def known_to_all(args: TrainingArguments, value: T) -> T:
    """The first process's value, in every process; `args`: transformers.TrainingArguments."""
    if args.world_size == 1:
        return value
    from torch.distributed import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def check_launch(config: Config, device: str) -> None:
    """Raises UsageError for a launch that cannot train this config."""
    fsdp, zero = _set("ACCELERATE_USE_FSDP"), _set("ACCELERATE_USE_DEEPSPEED")
    name = "FSDP" if fsdp else "DeepSpeed"
    if not (fsdp or zero):
        return
    if device == "cpu":
        raise UsageError(
            f"{name}: accelerate shards models over GPUs only, and would train a whole copy in each process. On "
            "processors: torchrun --nproc-per-node N -m merge finetune ..., without it."
        )
    if config.train == "qlora" and (fsdp or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"):
        raise UsageError(
            f"train: qlora cannot be combined with {'FSDP' if fsdp else 'ZeRO-3'}: 4-bit weights are not sharded here. "
            "Use train: lora, or launch without sharding (each GPU holds the 4-bit model)."
        )
    if fsdp and os.environ.get("FSDP_VERSION") == "1":
        raise UsageError("FSDP: version 1 is not supported. Set fsdp_version: 2 in accelerate's config.")
    if fsdp and config.optimizer.endswith("8bit"):
        raise UsageError(f"optimizer: {config.optimizer} does not take FSDP's sharded parameters. Use adamw.")


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on", "t")
