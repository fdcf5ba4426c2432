"""Checks between loading the model and training it: disk space, and that packing does not leak."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.data import Data
from finetune.data.pack import BatchRow
from finetune.objectives.base import Objective, moved
from merge.errors import OutputError, UsageError

if TYPE_CHECKING:
    from torch.nn import Module

_STATES = 2  # AdamW keeps two numbers for each trained parameter


def check_space(model: Module, folder: Path, adapter: bool) -> None:
    """Raises OutputError if checkpoints and result do not fit on the disk."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    # The newest, the best, and the one being written.
    needed = 3 * trained * (1 + _STATES) + (trained if adapter else whole)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{folder}: checkpoints and result need about {needed:,} bytes, and {free:,} are free. Make room, choose "
            "another out, or train fewer parameters (train: lora)."
        )


def check_packing(model: Module, data: Data, objective: Objective, pad: int) -> None:
    """Compares the loss of an example alone with its loss after another example in one row.

    An architecture that ignores position ids would let the second see the first. The tolerance is
    relative to the loss when it does see it.

    Raises:
        UsageError: the model's attention does not keep packed examples apart.
    """
    import torch

    from finetune.data.encode import Example

    examples = data.train.examples
    row = next((row for row in data.train.rows if len(row) > 1), None)
    if row is None:
        return
    first, second = examples[row[0]], examples[row[1]]
    joined = Example(
        np.concatenate([first.ids, second.ids]), np.concatenate([first.weights, second.weights]), second.place
    )
    silent = Example(first.ids, first.weights * 0, first.place)
    joined.weights[: len(first) + 1] = 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = []
    with torch.no_grad():
        for items, packed in (([second], False), ([silent, second], True), ([joined], False)):
            batch = moved(objective.collate([BatchRow(list(enumerate(items)), packed)], pad), device)
            losses.append(float(objective.loss(model, batch)))
    model.train(was_training)
    alone, behind, seeing = losses
    if abs(behind - alone) > 0.1 * abs(seeing - alone) + 1e-3 * abs(alone):
        raise UsageError(
            f"packing: this model does not keep packed examples apart (loss {alone:.4f} alone, {behind:.4f} behind "
            "another). Set packing: false."
        )
