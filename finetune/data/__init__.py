"""Reads and checks training data: files -> rows -> samples -> examples -> rows of a batch.

files.py    .jsonl .json .csv .tsv .parquet .txt -> rows with their places; hub.py: data sets of the hub
samples.py  rows -> samples, by templates or by the formats of formats.py (turns.py, preferences.py)
settle.py   which samples go into the chat template
mix.py      weights of several files; a part held out
encode.py   tokens, and the weight of each in the loss; tokenizer.py: new tokens, marks, template
pack.py     examples -> rows and tensors of a batch
show.py     what --show prints
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.contents import Sample
from finetune.data.encode import Encoder, Example
from finetune.data.files import Row, file_digest, find_file, read_rows
from finetune.data.hub import read_hub
from finetune.data.mix import hold_out, mix
from finetune.data.pack import Rows, make_rows, max_length
from finetune.data.samples import make_samples
from finetune.data.settle import settle
from finetune.keys import Config, DataSource
from finetune.sources import SourceStates
from merge.errors import Problem, RecipeError, UsageError
from merge.plan import SourceFile
from merge.quoting import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.objectives.base import Objective

_SHOWN = 5  # examples that one message names


@dataclass(frozen=True)
class Lengths:
    """Sizes of one part of the data, in tokens. `learnt`: with any weight; `dropped`, `cut`: samples too long."""

    examples: int
    tokens: int
    learnt: int
    median: int
    longest: int
    rows: int
    dropped: int
    cut: int

    def __str__(self) -> str:
        packed = f" in {counted(self.rows, 'row')}" if self.rows != self.examples else ""
        lost = "".join(f", {n:,} {what}" for n, what in ((self.dropped, "too long: dropped"), (self.cut, "cut")) if n)
        learnt = f", {self.learnt:,} in the loss" if self.learnt else ""  # of labels and embeddings there are none
        return (
            f"{counted(self.examples, 'example')}{packed}, {counted(self.tokens, 'token')}{learnt}; "
            f"length {self.median:,} in the median, {self.longest:,} at most{lost}"
        )


@dataclass(frozen=True)
class Data:
    """The training and validation data. `files`: path as the config has it -> sha256. `max_length`: tokens of a row."""

    objective: str
    train: Rows
    validation: Rows | None
    lengths: dict[str, Lengths]
    files: dict[str, str]
    max_length: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """The contents of the files, not yet tokenised. `sources`: the state of the files when they were read."""

    objective: str
    train: list[Sample]
    validation: list[Sample]
    files: dict[str, str]
    sources: SourceStates
    notes: tuple[str, ...]


def read_samples(config: Config, folder: Path | None) -> Samples:
    """Reads every file. The objective is the config's, or the default for these samples.

    Raises:
        RecipeError: all problems of files, columns and templates.
    """
    files: dict[str, str] = {}
    states: dict[str, SourceFile] = {}
    problems: list[Problem] = []
    notes: list[str] = []

    def read(sources: tuple[DataSource, ...], like: DataSource | None = None) -> list[list[Sample]]:
        sets = []
        for source in sources:
            try:
                rows, files[source.path] = _rows(source, folder, states)
                sets.append(make_samples(rows, source.read_like(like), config, notes))
            except UsageError as error:
                problems.append(Problem(str(error)))
        return sets

    sets = read(config.data)
    held = config.validation if isinstance(config.validation, tuple) else ()
    validation = [sample for samples in read(held, config.data[0]) for sample in samples]
    if problems:
        raise RecipeError(problems)
    if isinstance(config.validation, float):
        parts = [hold_out(samples, config.validation, config.seed) for samples in sets]
        validation = [sample for _, part in parts for sample in part]
        sets = [part for part, _ in parts]
        if not all(sets):
            raise UsageError(
                f"validation {config.validation:g}: leaves nothing to train on; the data set is too small."
            )
    train = mix(sets, [source.weight for source in config.data], config.seed)
    seen = {sample.content for sample in train}
    both = sum(sample.content in seen for sample in validation)
    if both:
        notes.append(f"{both:,} of {len(validation):,} validation examples are in the training data too")
    objective, said = _objective(config, [*train, *validation]), tuple(dict.fromkeys(notes))
    return Samples(objective, train, validation, files, tuple(states.items()), said)


def _rows(source: DataSource, folder: Path | None, states: dict[str, SourceFile]) -> tuple[list[Row], str]:
    """The rows of a file or of a data set of the hub, and their digest; adds the file's state."""
    path = find_file(source.path, folder)
    if path is None:
        return read_hub(source.path, source.subset, source.split)
    if source.subset or source.split:
        raise UsageError(f"data {source.path}: is a file; only data sets of the hub have subset and split.")
    states[source.path] = SourceFile.now(path)
    return read_rows(path), file_digest(path)


def _objective(config: Config, samples: list[Sample]) -> str:
    """The config's objective, or the default for these samples. Raises UsageError if they do not match."""
    from finetune.objectives import KINDS, OBJECTIVES

    first = samples[0]
    name = config.objective or KINDS[type(first.content)].objective
    for sample in samples:
        if not isinstance(sample.content, OBJECTIVES[name].takes):
            takes = " or ".join(KINDS[kind].name for kind in OBJECTIVES[name].takes)
            raise UsageError(
                f"data {sample.place}: holds {KINDS[type(sample.content)].name}; the objective {name} takes {takes}."
            )
    return name


def encode_samples(
    samples: Samples,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    objective: Objective | None = None,
) -> Data:
    """Samples -> examples -> rows.

    Args:
        context: tokens that the model can see; None if unknown.
        objective: bound to this run; by default the samples' own, unbound.

    Raises:
        UsageError, RecipeError: sequences that do not fit, examples that teach nothing, no chat template.
    """
    from finetune.objectives import OBJECTIVES

    objective = objective or OBJECTIVES[samples.objective]
    length = max_length(config, context)
    notes = list(samples.notes)
    parts = {"train": samples.train, "validation": samples.validation}
    if objective.by_token:
        parts = {part: settle(wanted, config, tokenizer, notes) for part, wanted in parts.items()}
    lengths, rows = {}, {}
    for part, wanted in parts.items():
        if not wanted:
            continue
        encoder = Encoder(tokenizer, config, length, held_out=part == "validation")
        examples = _encode(wanted, encoder, objective, length)
        # Validation is not packed: each row is one example, so losses can be separated by task.
        rows[part] = make_rows(examples, length, config.packing and part == "train")
        sizes = np.array([len(example) for example in examples])
        learnt = sum(int((example.weights > 0).sum()) for example in examples)
        lengths[part] = Lengths(
            *(len(examples), int(sizes.sum()), learnt, int(np.median(sizes)), int(sizes.max())),
            *(len(rows[part]), encoder.dropped, encoder.cut),
        )
        if encoder.straddling:
            notes.append(
                f"{part}: in {encoder.straddling:,} of {len(wanted):,} examples the end of the prompt and the "
                "start of the response are one token, which counts as response; end prompts without a space"
            )
    return Data(
        samples.objective,
        rows["train"],
        rows.get("validation"),
        lengths,
        samples.files,
        length,
        tuple(dict.fromkeys(notes)),
    )


def _encode(samples: list[Sample], encoder: Encoder, objective: Objective, max_length: int) -> list[Example]:
    """Samples repeated by weights are tokenised once. Raises UsageError for samples that cannot be trained on."""
    done: dict[tuple[str, str | None], list[Example]] = {}
    examples: list[Example] = []
    for sample in samples:
        key = (sample.place, sample.task)
        if key not in done:
            done[key] = objective.encode(sample, encoder)
        examples += done[key]
    long = [example for example in examples if example.longest > max_length]
    if long:
        worst = max(long, key=lambda example: example.longest)
        ways = "truncate, drop or split" if objective.splits else "truncate or drop"
        raise UsageError(
            f"data {worst.place}: {worst.longest:,} tokens, and a sequence may have {max_length:,}; so {len(long):,} "
            f"of {len(examples):,} examples are too long. Raise max_length as far as the model's context, or set "
            f"too_long: {ways}."
        )
    nothing = [example for example in examples if not (example.weights >= 1).any()]  # 1 is a response's
    if nothing and objective.by_token:
        found = list(dict.fromkeys(example.place for example in nothing))
        places = ", ".join(found[:_SHOWN])
        raise UsageError(
            f"data {places}{' ...' if len(found) > _SHOWN else ''}: no token of a response in {len(nothing):,} of "
            f"{len(examples):,} examples, so all of it is masked: empty, or cut away. Remove these examples; those "
            "that were cut, too_long: drop removes."
        )
    if not examples:
        raise UsageError(f"all {len(samples):,} examples were dropped: longer than max_length {max_length:,}.")
    return examples
