"""What is learnt: one file an objective, one line in OBJECTIVES, its name in finetune/keys.py.

An objective says which samples it takes, which class of model it trains, how a sample becomes examples, how rows become
a batch, and what the loss of a batch is: sums and the weights they are to be divided by, so that batches of any size
add up to the mean over the whole step, and over the whole validation set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from finetune.data.encode import Encoder, Example
from finetune.data.pack import Row
from finetune.data.samples import Conversation, Labelled, Pair, Preference, Sample, Text
from finetune.objectives.causal import Supervised, TextPretraining


class Objective(Protocol):
    """`takes`: kinds of samples; `model_class`: of transformers; `task_type`: PEFT's; `too_long`: the default."""

    @property
    def takes(self) -> tuple[type, ...]: ...
    @property
    def model_class(self) -> str: ...
    @property
    def task_type(self) -> str: ...
    @property
    def too_long(self) -> str: ...

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]: ...

    def collate(self, rows: Sequence[Row], pad: int) -> dict[str, Any]: ...

    def weights(self, batch: dict[str, Any]) -> Any:
        """(row,) float32: what the losses of these rows, added up, are to be divided by."""

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        """(row,) float32: the sum of the losses of each row; for one-row examples that is the loss of the example."""


class Kind(NamedTuple):
    """How messages call a kind of sample, and the objective that takes it where none is named."""

    name: str
    objective: str | None


OBJECTIVES: dict[str, Objective] = {"supervised": Supervised(), "text": TextPretraining()}

KINDS: dict[type, Kind] = {
    Conversation: Kind("conversations", "supervised"),
    Pair: Kind("prompts with completions", "supervised"),
    Text: Kind("texts", "text"),
    Preference: Kind("preference pairs", None),
    Labelled: Kind("texts with labels", None),
}
