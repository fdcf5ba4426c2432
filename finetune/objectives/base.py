"""The base of most objectives, and the facts about a run that an objective receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import numpy as np
from numpy.typing import NDArray

from finetune.data.contents import Sample
from finetune.data.encode import Example
from finetune.data.pack import Batch
from finetune.keys import Config
from finetune.sources import SourceStates

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from finetune.data import Data
    from finetune.models import Base


@dataclass(frozen=True)
class Run:
    """What is known when the data is read and the model is not. `folder`: of the config file."""

    config: Config
    base: Base
    folder: Path | None
    train: Sequence[Sample]
    validation: Sequence[Sample]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer


class Basics(ABC):
    """Defaults of an objective; see Objective in __init__.py for what they mean."""

    model_class = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    pipeline = "text-generation"
    unit = "a token"
    by_token = True
    packs = False
    splits = False
    prompts = True

    def bind(self, run: Run) -> Self:
        return self

    def loading(self) -> dict[str, object]:
        return {}

    def begin(self, model: nn.Module, data: Data, config: Config, device: str) -> None:
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.measure(model, batch)[0]

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return {}

    def record(self) -> dict[str, object]:
        return {}

    def sources(self) -> SourceStates:
        return ()

    def finish(self, folder: Path, model: nn.Module) -> None:
        return None

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]: ...


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
