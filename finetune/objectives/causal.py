"""Next-token prediction, which several objectives share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.data.pack import IGNORED, Batch, BatchRow, collate
from finetune.objectives.base import Objective, model_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Causal(Objective):
    packs = True
    splits = True

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        return collate(rows, pad)

    def weights(self, batch: Batch) -> Tensor:
        return batch["weights"].sum(1)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(row,) float32: the weighted sum of -log p(target) in nats, of every row; no columns."""
        losses = (token_losses(logits_of(model, batch), batch["targets"]) * batch["weights"]).sum(1)
        return losses, losses.new_zeros(len(losses), 0)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """(row, token, vocabulary)."""
    # use_cache=False: packing is recognised only without a cache. A learnt prompt has logits too: cut off.
    return model(**model_inputs(batch), use_cache=False).logits[:, -batch["input_ids"].shape[1] :]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (row, token, vocabulary), targets (row, token) -> -log p (row, token) float32; 0 where IGNORED."""
    import torch

    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets)
