"""Supervised fine-tuning: next-token prediction of responses."""

from __future__ import annotations

from finetune.data.contents import Conversation, Instruction, Sample, TextPair
from finetune.data.encode import Encoder, Example
from finetune.objectives.causal import Causal


class Supervised(Causal):
    """Responses count 1, prompts prompt_loss_weight."""

    takes: tuple[type, ...] = (Conversation, Instruction, TextPair)
    too_long = "error"

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        content, config = sample.content, encoder.config
        if isinstance(content, Conversation):
            ids, weights = encoder.conversation(content, sample.place)
        else:
            assert isinstance(content, TextPair)
            ids, weights = encoder.pair(content.prompt, content.completion)
        return encoder.fit(ids, weights, sample.place, sample.task, config.too_long or self.too_long)


OBJECTIVE = Supervised()
