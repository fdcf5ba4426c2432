"""Continued pretraining: next-token prediction on text."""

from __future__ import annotations

from finetune.data.contents import Sample, Text
from finetune.data.encode import Encoder, Example
from finetune.objectives.causal import Causal


class TextPretraining(Causal):
    """Every token counts; longer texts are split."""

    takes: tuple[type, ...] = (Text,)
    too_long = "split"

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        assert isinstance(sample.content, Text)
        ids, weights = encoder.text(sample.content.text)
        return encoder.fit(ids, weights, sample.place, sample.task, encoder.config.too_long or self.too_long)


OBJECTIVE = TextPretraining()
