"""Objective: the interface of objectives, and Run, the facts that they receive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import numpy as np
from numpy.typing import NDArray

from finetune.data.contents import Sample
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, BatchRow
from finetune.keys import Config
from finetune.sources import SourceStates

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from finetune.data import Data
    from finetune.models import Base


@dataclass(frozen=True)
class Run:
    """The facts known once the data is read, before the model is loaded. `folder`: of the config file."""

    config: Config
    base: Base
    folder: Path | None
    train: Sequence[Sample]
    validation: Sequence[Sample]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer


class Objective(ABC):
    """Turns samples into a loss, and defines how the model is loaded, scored and saved for it.

    Attributes:
        takes: kinds of samples.
        too_long: the default for longer examples.
        model_class, task_type: of transformers, and of PEFT.
        pipeline: the Hub's name for what the result does; text-generation is for models that write.
        unit: a loss is the mean over these: a token, an example, a pair.
        by_token: weights of tokens decide what is learnt, so an example without any teaches nothing.
        packs, splits: rows may hold several examples; a long text may become several.
        prompts: can be combined with prompt, prefix and P-tuning.
    """

    takes: tuple[type, ...]
    too_long: str
    model_class = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    pipeline = "text-generation"
    unit = "a token"
    by_token = True
    packs = False
    splits = False
    prompts = True

    def bind(self, run: Run) -> Self:
        """The objective bound to this run. Raises UsageError if the run does not fit it."""
        return self

    def loading(self) -> dict[str, object]:
        """Attributes for the model's config."""
        return {}

    def begin(self, model: nn.Module, data: Data, config: Config, device: str) -> None:
        """Called once, before training (also before it is resumed), with the model as the base is."""
        return

    @abstractmethod
    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]: ...

    @abstractmethod
    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch: ...

    @abstractmethod
    def weights(self, batch: Batch) -> Tensor:
        """(row,) float32: the divisor for the sum of these rows' losses."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses (row,) float32: the sum of each row; columns (row, column) float32: what metrics() needs of them)."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.measure(model, batch)[0]

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """columns (example, column) float64 of the whole validation set -> figures by name."""
        return {}

    def record(self) -> dict[str, object]:
        """Entries for the manifest."""
        return {}

    def sources(self) -> SourceStates:
        """Files that it reads besides model and data, with their state at reading."""
        return ()

    def finish(self, folder: Path, model: nn.Module) -> None:
        """Adds further files to the result."""
        return


def pad_rows(sequences: Sequence[NDArray[np.generic]], fill: float, dtype: type[np.generic] = np.int64) -> Tensor:
    """Sequences of any lengths -> (row, token) tensor, filled up on the right."""
    import torch

    table = np.full((len(sequences), max(map(len, sequences))), fill, dtype)
    for row, values in enumerate(sequences):
        table[row, : len(values)] = values
    return torch.from_numpy(table)


def inputs_of(sequences: Sequence[NDArray[np.int32]], pad: int) -> Batch:
    """input_ids and attention_mask (row, token) int64."""
    mask = pad_rows([np.ones(len(ids)) for ids in sequences], 0)
    return {"input_ids": pad_rows(sequences, pad), "attention_mask": mask}


def model_inputs(batch: Batch) -> dict[str, object]:
    return {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}


def moved(batch: Batch, device: str) -> Batch:
    """The batch with its tensors on a device."""
    there = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    return cast(Batch, there)
