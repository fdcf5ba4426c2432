"""Objectives: one file each, named after the objective, which holds OBJECTIVE. Adding a file adds an objective.

An objective says which samples it takes, which class of model it trains, how a sample becomes examples, how rows become
a batch, and what the loss of a batch is: sums and the weights they are to be divided by, so that batches of any size
add up to the mean over the whole step, and over the whole validation set. They share base.py and causal.py.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

from finetune.data.contents import Conversation, Instruction, Judged, Labelled, Preference, Text, TextPair
from finetune.keys import KEYS, PROMPTS, Config
from finetune.objectives.base import Objective, Run
from merge.errors import UsageError
from merge.schema.names import one_of


class SampleKind(NamedTuple):
    """A kind of sample: its name in messages, and its objective if the config names none."""

    name: str
    objective: str


OBJECTIVES: dict[str, Objective] = {
    name: importlib.import_module(f"{__name__}.{name}").OBJECTIVE for name in KEYS["objective"].choices
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
        UsageError: settings that it does not take, or data and tokenizers that it cannot learn from.
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
    if config.train in PROMPTS and not objective.prompts:
        raise UsageError(
            f"train: {config.train} puts its tokens before a text, which objective {name} cannot use. "
            "Use lora, ia3, bottleneck, full, partial or bitfit."
        )
    return objective.bind(run)
