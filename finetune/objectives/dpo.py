"""Direct preference optimisation (DPO): raises the probability of the better of two answers, lowers the other's.

Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. With the reward r(y) = beta (log p(y|x) - log p_ref(y|x)), and
h = r(chosen) - r(rejected):

    loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

e is the share of labels taken to be wrong (label_smoothing, 0 by default: the paper's loss; Mitchell 2023, "A note on
DPO with noisy preferences"). log p is the sum over the answer's tokens with its end mark.

The reference is the model without its adapter, or in full training the model as it was; its log-probabilities are
computed once, before training, so no second model is held and no pass of an epoch is spent on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from finetune.data.contents import Preference, Sample, Turns
from finetune.data.encode import Encoder, Example
from finetune.data.pack import IGNORED, Batch, BatchRow
from finetune.keys import Config
from finetune.objectives.base import Objective, Run, inputs_of, moved, pad_rows
from finetune.objectives.causal import logits_of, token_losses
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data import Data


class DirectPreference(Objective):
    takes: tuple[type, ...] = (Preference,)
    too_long = "error"
    unit = "a pair"

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._reference: dict[bytes, tuple[float, float]] = {}  # tokens of a pair -> log p_ref of both answers

    def bind(self, run: Run) -> Self:
        return type(self)(run.config)

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        """One example: the chosen sequence, then the rejected one."""
        content = sample.content
        assert isinstance(content, Preference)
        if content.chosen == content.rejected:
            raise UsageError(f"data {sample.place}: chosen and rejected are the same, so there is no preference.")
        answers = (content.chosen, content.rejected)
        return self._examples(sample, encoder, content.prompt, answers, content.tools)

    def _examples(
        self, sample: Sample, encoder: Encoder, prompt: str | Turns, answers: Sequence[str | Turns], tools: str
    ) -> list[Example]:
        """One example, with a sequence for each of the answers to the prompt."""
        config, parts = encoder.config, []
        for answer in answers:
            if isinstance(prompt, str) or isinstance(answer, str):
                ids, weights = encoder.pair(str(prompt), str(answer))
            else:
                ids, weights = encoder.answer(prompt, answer, tools, sample.place)
            fitted = encoder.fit(ids, (weights >= 1).astype(np.float32), sample.place, None, config.too_long or "error")
            if not fitted:
                return []
            parts.append(fitted[0])
            if not parts[-1].weights.any():
                raise UsageError(
                    f"data {sample.place}: no token of an answer is left to compare: it is empty, or cut away. Remove "
                    "the pair, or set too_long: drop."
                )
        ids, weights = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "weights"))
        return [Example(ids, weights, sample.place, sample.task, starts=(len(parts[0]),))]

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        """Chosen sequences, then the rejected ones: input_ids, attention_mask, targets (2 row, token) int64; weights
        (2 row, token) float32; reference (row, 2) float32, of the answers."""
        import torch

        numbers, examples = zip(*(item for row in rows for item in row.examples), strict=True)
        parts = [[example.sequences[side] for example in examples] for side in (0, 1)]
        ids, weights = zip(*(part for side in parts for part in side), strict=True)
        shifted = [np.append(one[1:], 0) for one in weights]
        targets = [
            np.where(weight > 0, np.append(one[1:], 0), IGNORED) for one, weight in zip(ids, shifted, strict=True)
        ]
        known = [self._reference.get(example.ids.tobytes(), (0.0, 0.0)) for example in examples]
        return {
            **inputs_of(ids, pad),
            "targets": pad_rows(targets, IGNORED),
            "weights": pad_rows(shifted, 0, np.float32),
            "reference": torch.tensor(known, dtype=torch.float32),
            "examples": list(numbers),
        }

    def begin(self, model: nn.Module, data: Data, config: Config, device: str) -> None:
        import torch

        from finetune.models import computing, local_device

        if next(model.parameters()).device.type != device:
            model.to(local_device(device))
        was_training = model.training
        model.eval()
        pad = model.config.pad_token_id or 0  # masked
        for rows in filter(None, (data.train, data.validation)):
            for start in range(0, len(rows), config.batch_size):
                # In the order and batches of evaluation, so that margins before training are exactly zero.
                part = [rows[i] for i in range(start, min(start + config.batch_size, len(rows)))]
                batch = moved(self.collate(part, pad), local_device(device))
                with torch.no_grad(), without_adapter(model), computing(config, device):
                    found = self._log_probabilities(model, batch).T.tolist()
                for row, (chosen, rejected) in zip(part, found, strict=True):
                    self._reference[row.examples[0][1].ids.tobytes()] = (chosen, rejected)
        model.train(was_training)

    def weights(self, batch: Batch) -> Tensor:
        return batch["reference"].new_ones(len(batch["reference"]))

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        rewards = self._config.beta * (self._log_probabilities(model, batch) - batch["reference"].T)
        margin = rewards[0] - rewards[1]
        wrong, log_sigmoid = self._config.label_smoothing, torch.nn.functional.logsigmoid
        losses = -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin)
        return losses, torch.stack([rewards[0], rewards[1]], 1).detach()

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Mean rewards, their margin, and the share of pairs with more reward for the chosen answer (ties: half)."""
        chosen, rejected = columns.T
        margin = chosen - rejected
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        return {
            "reward_accuracy": float(right.mean()),
            "reward_margin": float(margin.mean()),
            "reward_chosen": float(chosen.mean()),
            "reward_rejected": float(rejected.mean()),
        }

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """(2, row) float32: log p of the chosen and of the rejected answers."""
        losses = token_losses(logits_of(model, batch), batch["targets"]) * batch["weights"]
        return -losses.sum(1).view(2, -1)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base's own computation, whatever adapter is in it."""
    from merge.loading.bottleneck import silent_bottlenecks

    adapter = model.disable_adapter() if hasattr(model, "disable_adapter") else silent_bottlenecks(model)
    with adapter:
        yield


OBJECTIVE = DirectPreference()
