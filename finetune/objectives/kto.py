"""Kahneman-Tversky optimisation (KTO): raises the probability of wanted answers, lowers that of unwanted ones.

Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4. With r = beta (log p(y|x) - log p_ref(y|x)), and z the
mean of r over answers that belong to other prompts of the batch, at least 0 and without a gradient:

    wanted_weight   (1 - sigmoid(r - z))   for a wanted answer
    unwanted_weight (1 - sigmoid(z - r))   for an unwanted one

Each prompt's foreign answer is that of the next example in the data, so it stays the same in all epochs. z is taken
over a batch: with gradient accumulation each batch has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.data.contents import Judged, Sample
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, BatchRow
from finetune.objectives.dpo import DirectPreference

if TYPE_CHECKING:
    from torch import Tensor, nn


class JudgedAnswers(DirectPreference):
    """Sequences of an example: the answer, and the foreign one, in the places of DPO's chosen and rejected."""

    takes = (Judged,)
    unit = "an answer"

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        content = sample.content
        assert isinstance(content, Judged)
        answers = (content.completion, content.foreign)
        made = self._examples(sample, encoder, content.prompt, answers, content.tools)
        return [replace(example, label=int(content.wanted)) for example in made]

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        """As DPO's; wanted (row,) bool."""
        import torch

        wanted = [bool(example.label) for row in rows for _, example in row.examples]
        batch = super().collate(rows, pad)
        batch["wanted"] = torch.tensor(wanted)
        return batch

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        rewards, foreign = self._config.beta * (self._log_probabilities(model, batch) - batch["reference"].T)
        ahead = rewards - foreign.mean().clamp(min=0).detach()
        signs = batch["wanted"] * 2.0 - 1
        weights = torch.where(batch["wanted"], self._config.wanted_weight, self._config.unwanted_weight)
        losses = weights * (1 - torch.sigmoid(signs * ahead))
        return losses, torch.stack([rewards, signs], 1).detach()

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Mean rewards of wanted and of unwanted answers, if there are any, and their difference."""
        rewards, signs = columns.T
        means = {
            name: float(rewards[signs == sign].mean())
            for name, sign in (("reward_wanted", 1), ("reward_unwanted", -1))
            if (signs == sign).any()
        }
        return means | ({"reward_margin": means["reward_wanted"] - means["reward_unwanted"]} if len(means) == 2 else {})


OBJECTIVE = JudgedAnswers()
