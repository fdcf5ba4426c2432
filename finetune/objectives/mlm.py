"""Masked language modelling: a bidirectional model (BERT) predicts hidden tokens.

Source: Devlin et al. 2019, "BERT" (arXiv:1810.04805), section 3.1: 15 % of the tokens are chosen; of these 80 % become
the mask, 10 % a random token, 10 % stay. Deviations: the chosen number is exact for every sequence (at least one), and
marks of the tokenizer are never chosen or drawn. What is hidden is decided once, by seed: the same in every epoch and
on every machine; `mask_copies` makes several differently masked examples of each text, as the paper's own data had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from finetune.data.contents import Sample, Text
from finetune.data.encode import Encoder, Example
from finetune.data.pack import IGNORED, Batch, BatchRow
from finetune.objectives.base import Objective, Run, inputs_of, model_inputs, pad_rows
from finetune.objectives.causal import token_losses
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class MaskedLanguageModelling(Objective):
    takes = (Text,)
    too_long = "split"
    model_class = "AutoModelForMaskedLM"
    task_type = None
    pipeline = "fill-mask"
    splits = True
    prompts = False

    def __init__(self, mask: int = -1, plain: tuple[int, ...] = ()) -> None:
        self._mask, self._plain = mask, plain

    def bind(self, run: Run) -> Self:
        tokenizer = run.tokenizer
        if tokenizer.mask_token_id is None:
            raise UsageError(
                "objective mlm: the tokenizer has no mask token, so the model was not trained for it. Use a "
                "model of the BERT kind, or objective text."
            )
        if run.config.whole_words and not tokenizer.is_fast:
            raise UsageError("whole_words: this tokenizer does not mark the tokens of a word; remove it.")
        marks = set(tokenizer.all_special_ids)
        return type(self)(tokenizer.mask_token_id, tuple(i for i in range(len(tokenizer)) if i not in marks))

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        assert isinstance(sample.content, Text)
        config = encoder.config
        examples = []
        for number, (ids, words) in enumerate(encoder.chunks(sample.content.text, config.too_long or self.too_long)):
            for copy in range(1 if encoder.held_out else config.mask_copies):
                seed = f"{config.seed}:mask:{number}:{copy}:{sample.content.text}"
                hidden, chosen = self._hide(ids, words, config.mask_rate, config.whole_words, seed)
                examples.append(Example(hidden, chosen.astype(np.float32), sample.place, sample.task, targets=ids))
        return examples

    def _hide(
        self, ids: NDArray[np.int32], words: Sequence[int | None], rate: float, whole: bool, seed: str
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """ids (token,), words (token,): the word of each token, None for marks -> (what the model sees, chosen)."""
        digest = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        able = [i for i, word in enumerate(words) if word is not None]
        chosen = np.zeros(len(ids), bool)
        wanted = max(1, round(rate * len(able)))
        groups: dict[int | None, list[int]] = {}
        for i in able:
            groups.setdefault(words[i] if whole else i, []).append(i)
        parts = list(groups.values())
        for part in rng.permutation(len(parts)):
            if chosen.sum() >= wanted:
                break
            chosen[parts[part]] = True
        places = np.flatnonzero(chosen)
        fate = rng.random(len(places))
        hidden = ids.copy()
        hidden[places[fate < 0.8]] = self._mask
        drawn = places[(fate >= 0.8) & (fate < 0.9)]
        hidden[drawn] = rng.choice(np.array(self._plain, np.int32), len(drawn))
        return hidden, chosen

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        """input_ids, attention_mask, targets (row, token) int64; weights (row, token) float32."""
        examples = [example for row in rows for _, example in row.examples]
        targets = [
            np.where(one.weights > 0, one.ids if one.targets is None else one.targets, IGNORED) for one in examples
        ]
        return {
            **inputs_of([one.ids for one in examples], pad),
            "targets": pad_rows(targets, IGNORED),
            "weights": pad_rows([one.weights for one in examples], 0, np.float32),
            "examples": [i for row in rows for i, _ in row.examples],
        }

    def weights(self, batch: Batch) -> Tensor:
        return batch["weights"].sum(1)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        logits, weights = model(**model_inputs(batch)).logits, batch["weights"]
        right = ((logits.argmax(-1) == batch["targets"]) * weights).sum(1)
        losses = (token_losses(logits, batch["targets"]) * weights).sum(1)
        return losses, torch.stack([right.float(), weights.sum(1)], 1)

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Share of hidden tokens whose most probable prediction is right."""
        right, weight = columns.sum(0).tolist()
        return {"accuracy": right / weight}


OBJECTIVE = MaskedLanguageModelling()
