"""prepare(config): the data, the model's config and its tokenizer, checked before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.before import check_packages
from finetune.data import Data, encode_samples, read_samples
from finetune.data.tokenizer import set_up_tokenizer
from finetune.keys import Config
from finetune.models import Base, check_trainable, open_base
from finetune.objectives import OBJECTIVES, bind_objective
from finetune.objectives.base import Objective, Run
from finetune.rope import scale_rope
from finetune.sources import SourceStates
from merge.loading.libraries import quiet_libraries


@dataclass(frozen=True)
class Prepared:
    """Everything known before the weights are read. `data_sources`: the files of the data."""

    config: Config
    base: Base
    data: Data
    objective: Objective
    new_ids: tuple[int, ...]
    notes: tuple[str, ...]
    data_sources: SourceStates

    @property
    def sources(self) -> SourceStates:
        """All files that are read, in their state at that time."""
        return (*self.base.sources, *self.data_sources, *self.objective.sources())

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(name, path) of what the result must not replace."""
        return (("the model", self.base.path), *((name, file.path) for name, file in self.sources))


def prepare(config: Config, folder: Path | None = None) -> Prepared:
    """Reads and checks the data, the model's config and tokenizer; `folder` is that of the config file.

    Raises:
        MergeError: whatever is wrong, in one message.
    """
    check_packages(config)
    samples = read_samples(config, folder)
    with quiet_libraries():
        base = scale_rope(open_base(config.model, folder, config.adapter), config)
    check_trainable(base, config)
    before = len(base.tokenizer)
    writes = OBJECTIVES[samples.objective].pipeline == "text-generation"
    notes = set_up_tokenizer(base.tokenizer, config, folder, writes)
    with quiet_libraries():
        objective = bind_objective(samples.objective, Run(config, base, folder, samples.train, samples.validation))
    data = encode_samples(samples, config, base.tokenizer, base.context, objective)
    new_ids = tuple(range(before, len(base.tokenizer)))
    return Prepared(config, base, data, objective, new_ids, (*notes, *data.notes), samples.sources)
