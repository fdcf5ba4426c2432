"""Checks a config before any heavy import: whether it names tasks, and which packages it needs."""

from __future__ import annotations

from pathlib import Path

import yaml

from finetune.keys import Config
from merge.errors import RecipeError
from merge.needs import need
from merge.schema.document import FileKind, compose_value, read_text

CONFIG = FileKind("config", "model: org/base", "model and data")
TASK_KEYS = ("tasks", "strategy", "merge", "workers")


def is_task_file(file: str | None) -> bool:
    """Whether a config names tasks; False for an unreadable file, which the usual reader reports."""
    try:
        root = compose_value(read_text(Path(file), CONFIG)) if file else None
    except RecipeError:
        return False
    return isinstance(root, yaml.MappingNode) and any(key.value in TASK_KEYS for key, _ in root.value)


def check_packages(config: Config) -> None:
    """Raises UsageError for a package that the config needs and that is not installed."""
    if config.tensorboard:
        need("tensorboard: true", "tensorboard", "tensorboard")
    if config.train == "qlora":
        need("train: qlora", "finetune", "bitsandbytes", otherwise="Or use train: lora.")
    if config.optimizer.endswith("8bit"):
        need(f"optimizer: {config.optimizer}", "finetune", "bitsandbytes")
    if config.attention == "flash_attention_2":
        need("attention: flash_attention_2", "flash-attn", "flash_attn")
    validation = config.validation if isinstance(config.validation, tuple) else ()
    for source in (*config.data, *validation):
        if source.path.endswith(".parquet"):
            need(f"data {source.path}: parquet", "finetune", "pyarrow")
