"""Objectives: one file each, one line in OBJECTIVES, and the name in finetune/keys.py.

An objective says which samples it takes, which class of model it trains, how a sample becomes examples, how rows become
a batch, and what the loss of a batch is: sums and the weights they are to be divided by, so that batches of any size
add up to the mean over the whole step, and over the whole validation set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from finetune.data.contents import Conversation, Instruction, Judged, Labelled, Preference, Sample, Text, TextPair
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, BatchRow
from finetune.keys import KEYS, Config
from finetune.objectives.base import Run
from finetune.objectives.causal import Supervised, TextPretraining
from finetune.objectives.classification import Classification
from finetune.objectives.distillation import Distillation
from finetune.objectives.embeddings import Embeddings
from finetune.objectives.infilling import Infilling
from finetune.objectives.judged import JudgedAnswers
from finetune.objectives.masked import MaskedLanguageModelling
from finetune.objectives.preference import DirectPreference
from finetune.sources import SourceStates
from merge.errors import UsageError
from merge.schema.names import one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data import Data


class Objective(Protocol):
    """`takes`: kinds of samples; `model_class`: of transformers; `task_type`: PEFT's; `too_long`: the default.

    pipeline: the Hub's name for what the result does; text-generation is for models that write.
    unit: what a loss is the mean over: a token, an example, a pair.
    by_token: weights of tokens say what is learnt, so an example without any teaches nothing.
    packs, splits: rows may hold several examples; a long text may become several.
    prompts: goes with prompt, prefix and P-tuning.
    """

    @property
    def takes(self) -> tuple[type, ...]: ...
    @property
    def model_class(self) -> str: ...
    @property
    def task_type(self) -> str | None: ...
    @property
    def too_long(self) -> str: ...
    @property
    def pipeline(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def by_token(self) -> bool: ...
    @property
    def packs(self) -> bool: ...
    @property
    def splits(self) -> bool: ...
    @property
    def prompts(self) -> bool: ...

    def bind(self, run: Run) -> Objective:
        """The objective for this run, which may keep what it needs. Raises UsageError for what does not fit it."""

    def loading(self) -> dict[str, object]:
        """Attributes that the model's config is to have."""

    def begin(self, model: nn.Module, data: Data, config: Config, device: str) -> None:
        """Called once, before training (also before it is resumed), with the model as the base is."""

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]: ...

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch: ...

    def weights(self, batch: Batch) -> Tensor:
        """(row,) float32: what the losses of these rows, added up, are to be divided by."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """(row,) float32: the sum of the losses of each row; for one-row examples that is the loss of the example."""

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses as loss() gives them, (row, column) float32: what metrics() needs of these rows)."""

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """columns (example, column) float64 of the whole validation set -> figures by name."""

    def record(self) -> dict[str, object]:
        """What the manifest keeps of it."""

    def sources(self) -> SourceStates:
        """Files that it reads beside model and data, as they were then."""

    def finish(self, folder: Path, model: nn.Module) -> None:
        """Adds files to the result that its users need."""


class SampleKind(NamedTuple):
    """How messages call a kind of sample, and the objective that takes it where none is named."""

    name: str
    objective: str


OBJECTIVES: dict[str, Objective] = {
    "supervised": Supervised(),
    "text": TextPretraining(),
    "infilling": Infilling(),
    "mlm": MaskedLanguageModelling(),
    "classification": Classification(),
    "dpo": DirectPreference(),
    "kto": JudgedAnswers(),
    "distillation": Distillation(),
    "embeddings": Embeddings(),
}

KINDS: dict[type, SampleKind] = {
    Conversation: SampleKind("conversations", "supervised"),
    TextPair: SampleKind("prompts with completions", "supervised"),
    Instruction: SampleKind("instructions", "supervised"),
    Text: SampleKind("texts", "text"),
    Preference: SampleKind("preference pairs", "dpo"),
    Judged: SampleKind("answers that are wanted or not", "kto"),
    Labelled: SampleKind("texts with labels", "classification"),
}


def bind_objective(name: str, run: Run) -> Objective:
    """The objective of this name for a run.

    Raises:
        UsageError: settings that do not go with it, or data and tokenizers that it cannot learn from.
    """
    objective, config = OBJECTIVES[name], run.config
    for key, facts in KEYS.items():
        if facts.objectives and name not in facts.objectives and getattr(config, key) != getattr(Config(), key):
            raise UsageError(
                f'"{key}" belongs to objective: {one_of(facts.objectives)}; this is {name}, which the data is for. '
                "Remove the key, or name the objective."
            )
    if config.packing and not objective.packs:
        raise UsageError(f"packing: objective {name} has one example a row; set packing: false.")
    if config.too_long == "split" and not objective.splits:
        raise UsageError(f"too_long: examples of objective {name} cannot be split; use truncate or drop.")
    if config.train in ("prompt", "prefix", "ptuning") and not objective.prompts:
        raise UsageError(
            f"train: {config.train} puts its tokens before a text, which objective {name} cannot use. "
            "Use lora, ia3, bottleneck, full, partial or bitfit."
        )
    return objective.bind(run)
