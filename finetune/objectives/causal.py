"""Next-token prediction: supervised fine-tuning on responses, and continued pretraining on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data.encode import Encoder, Example
from finetune.data.pack import IGNORED, Row, collate
from finetune.data.samples import Conversation, Pair, Sample, Text


class _Causal:
    model_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"

    def collate(self, rows: Sequence[Row], pad: int) -> dict[str, Any]:
        return collate(rows, pad)

    def weights(self, batch: dict[str, Any]) -> Any:
        return batch["weights"].sum(1)

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        """(row,) float32: the weighted sum of -log p(target) in nats, of every row."""
        import torch

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        targets = batch["targets"]
        # use_cache=False: packing is recognised only without a cache. A learnt prompt has logits too: cut off.
        logits = model(**inputs, use_cache=False).logits[:, -targets.shape[1] :]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return (losses.view_as(targets) * batch["weights"]).sum(1)


class Supervised(_Causal):
    """Responses count 1, prompts prompt_loss_weight."""

    takes = (Conversation, Pair)
    too_long = "error"

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        content, config = sample.content, encoder.config
        if isinstance(content, Pair) and config.chat:
            content = Conversation((("user", content.prompt), ("assistant", content.completion)))
        if isinstance(content, Conversation):
            ids, weights = encoder.conversation(content.messages, sample.place)
        else:
            assert isinstance(content, Pair)
            ids, weights = encoder.pair(content.prompt, content.completion)
        return encoder.fit(ids, weights, sample.place, sample.task, config.too_long or self.too_long)


class TextPretraining(_Causal):
    """Every token counts; longer texts are split."""

    takes = (Text,)
    too_long = "split"

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        assert isinstance(sample.content, Text)
        ids, weights = encoder.text(sample.content.text)
        return encoder.fit(ids, weights, sample.place, sample.task, encoder.config.too_long or self.too_long)
