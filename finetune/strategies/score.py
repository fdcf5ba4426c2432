"""Scores a model on every task's held-out data: mean loss, and exact match if prompts have one answer.

Exact match is teacher-forced: an answer counts if every token of it, the end mark included, is the likeliest one after
what comes before. That is the answer that greedy decoding gives, at the price of one pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data import read_samples
from finetune.data.contents import Instruction, TextPair
from finetune.data.pack import IGNORED, Batch
from finetune.models import load_model, trained_from
from finetune.objectives import OBJECTIVES
from finetune.objectives.base import moved
from finetune.prepare import Prepared
from finetune.trainables import TRAINABLES
from merge.loading import load_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class StrategyScore:
    """`loss`: nats a token; `exact`: share of right answers, None if the data are not prompts with completions."""

    loss: float
    exact: float | None
    examples: int

    @property
    def exact_error(self) -> float | None:
        """Standard error of `exact`, binomial, add-one smoothed."""
        if self.exact is None:
            return None
        p = (self.exact * self.examples + 1) / (self.examples + 2)
        return math.sqrt(p * (1 - p) / self.examples)


class Scorer:
    """Scores models on every task. `prepared`: task -> its data, from the base."""

    def __init__(self, prepared: Mapping[str, Prepared], folder: Path | None, device: str) -> None:
        self._prepared, self._device = dict(prepared), device
        self._exact = {
            name: OBJECTIVES[one.data.objective].pipeline == "text-generation"
            and all(
                isinstance(sample.content, (TextPair, Instruction))
                for sample in read_samples(one.config, folder).validation
            )
            for name, one in prepared.items()
        }

    def score(self, path: Path | None, adapter: bool = False) -> dict[str, StrategyScore]:
        """A model directory, or an adapter of the base; None is the base itself."""
        import torch

        first = next(iter(self._prepared.values()))
        model = _open(first, path, adapter, self._device)
        model.eval()
        scores = {}
        with torch.no_grad():
            for name, one in self._prepared.items():
                scores[name] = _score(model, one, self._exact[name], self._device)
        return scores


def _open(prepared: Prepared, path: Path | None, adapter: bool, device: str) -> nn.Module:
    base, config = prepared.base, prepared.config
    objective = OBJECTIVES[prepared.data.objective]
    if path is not None and not adapter:
        base, config = trained_from(base, str(path)), dataclasses.replace(config, train="full")
    model = load_model(base, config, objective.model_class, device)
    if path is not None and adapter:
        if config.train == "bottleneck":
            from merge.loading.bottleneck import load_bottlenecks

            model = load_bottlenecks(model, path)
        else:
            model = load_adapter(model, str(path))
    return model if config.train == "qlora" else model.to(device)


def _score(model: nn.Module, prepared: Prepared, exact: bool, device: str) -> StrategyScore:
    data, config = prepared.data, prepared.config
    assert data.validation is not None
    objective = OBJECTIVES[data.objective]
    pad = prepared.base.tokenizer.pad_token_id
    # Sequences of similar length in a batch need less padding. The order of sums is the same for every model.
    lengths = [len(example) for example in data.validation.examples]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    loss = weight = 0.0
    right = 0
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda *seen: logits.append(seen[-1].logits)) if exact else None
    for start in range(0, len(order), config.batch_size):
        rows = [data.validation[i] for i in order[start : start + config.batch_size]]
        batch = moved(objective.collate(rows, pad), device)
        losses = objective.loss(model, batch)
        loss += float(losses.double().sum())
        weight += float(objective.weights(batch).double().sum())
        right += _right(logits.pop(), batch) if exact else 0
    if hook is not None:
        hook.remove()
    return StrategyScore(loss / weight, right / len(order) if exact else None, len(order))


def _right(logits: Tensor, batch: Batch) -> int:
    """Rows whose every weighted target is the likeliest token. logits (row, position, token)."""
    targets = batch["targets"]
    best = logits[:, -targets.shape[1] :].argmax(-1)
    asked = (targets != IGNORED) & (batch["weights"] >= 1)
    return int(((best == targets) | ~asked).all(1).sum())


def is_adapter(train: str) -> bool:
    return TRAINABLES[train].adapter
