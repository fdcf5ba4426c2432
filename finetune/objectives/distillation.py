"""Distillation: the student learns the teacher's whole distribution over the next token, not only the token.

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2. Per
token, with temperature T and share a:

    a T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - a) (-log p_student(target))

T^2 keeps the gradients of both parts comparable. The teacher reads what the student reads, in the same batch, so
nothing is stored; that costs the teacher's memory and a forward pass a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from finetune.data.contents import Conversation, Instruction, Sample, Text, TextPair
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, max_length
from finetune.keys import Config
from finetune.objectives.base import Run
from finetune.objectives.causal import Causal, logits_of, token_losses
from finetune.objectives.supervised import Supervised
from finetune.objectives.text import TextPretraining
from finetune.sources import SourceStates, weight_digests
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data import Data
    from finetune.models import Base


class Distillation(Causal):
    """Takes the samples of supervised training and pretraining, with the same token weights."""

    takes = (Conversation, Instruction, TextPair, Text)
    too_long = "error"

    def __init__(self, config: Config | None = None, base: Base | None = None, vocabulary: int = 0) -> None:
        self._config, self._base, self._vocabulary = config or Config(), base, vocabulary
        self._teacher: nn.Module | None = None

    def bind(self, run: Run) -> Self:
        from finetune.models import open_base

        if run.config.teacher is None:
            raise UsageError("objective distillation needs teacher: the model to learn from.")
        teacher = open_base(run.config.teacher, run.folder, key="teacher")
        own, other = run.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
        if own != other:
            word = next(word for word in {**own, **other} if own.get(word) != other.get(word))
            raise UsageError(
                f"teacher {run.config.teacher}: its vocabulary is not the student's ({len(other):,} tokens and "
                f'{len(own):,}; "{word}" is {other.get(word, "missing")} and {own.get(word, "missing")}), so their '
                "logits do not compare. Take a teacher with the same tokenizer."
            )
        length = max_length(run.config, run.base.context)
        if teacher.context is not None and length > teacher.context:
            raise UsageError(
                f"max_length: {length:,} is more than the teacher's context of {teacher.context:,} tokens."
            )
        return type(self)(run.config, teacher, len(own))

    def record(self) -> dict[str, object]:
        assert self._base is not None
        return {"teacher_weights_xxh3_128": weight_digests(self._base.path)}

    def sources(self) -> SourceStates:
        assert self._base is not None
        return self._base.sources

    def begin(self, model: nn.Module, data: Data, config: Config, device: str) -> None:
        from finetune.models import load_model, local_device

        assert self._base is not None
        # Loaded like a frozen model: in bfloat16 if a GPU computes in it.
        settings = dataclasses.replace(config, train="lora", adapter=None, new_tokens=())
        teacher = load_model(self._base, settings, self.model_class, device).to(local_device(device)).eval()
        self._teacher = teacher.requires_grad_(False)

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        plain = TextPretraining() if isinstance(sample.content, Text) else Supervised()
        return plain.encode(sample, encoder)

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Nats a token: of the labels alone, and KL to the teacher at the temperature, without T^2."""
        labels, divergence, weights = columns.sum(0).tolist()
        return {"label_loss": labels / weights, "teacher_kl": divergence / weights}

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Columns: sums over the weighted tokens of the labels' losses, of KL, and of the weights."""
        import torch

        config, weights = self._config, batch["weights"]
        assert self._teacher is not None
        with torch.no_grad():
            wanted = logits_of(self._teacher, batch)[..., : self._vocabulary]
        logits = logits_of(model, batch)[..., : self._vocabulary]
        labels = (token_losses(logits, batch["targets"]) * weights).sum(1)
        heat = config.temperature
        wanted, found = (torch.log_softmax(x.float() / heat, -1) for x in (wanted, logits))
        divergence = ((wanted.exp() * (wanted - found)).sum(-1) * weights).sum(1)
        share = config.distillation_alpha
        losses = share * heat**2 * divergence + (1 - share) * labels
        return losses, torch.stack([labels, divergence, self.weights(batch)], 1).detach()


OBJECTIVE = Distillation()
