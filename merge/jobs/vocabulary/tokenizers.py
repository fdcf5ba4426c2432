"""Side files of the output: tokenizer and chat template of one input, everything else from the config's donor.

Notes say which inputs number tokens otherwise where nothing arranges them, and which files the donor lacks.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from merge.architecture import is_embedding
from merge.chat import named as chat
from merge.checkpoint import Checkpoint
from merge.checkpoint.files import read_json
from merge.checkpoint.side_files import code_files, list_side_files
from merge.errors import CheckpointError, Problem
from merge.jobs.vocabulary.rows import Vocabulary
from merge.plan import SideFile
from merge.planned import Planned, Said
from merge.planning.inputs import Input, Inputs
from merge.quoting import some
from merge.recipe.model import Recipe
from merge.vocabulary.files import is_tokenizer_file, tokenizer_code, tokenizer_files
from merge.vocabulary.memory import TokenizerMemory, compared_memory
from merge.vocabulary.tokenizer import has_tokenizer, read_template, read_tokenizer

_FILE = "tokenizer.json"
_GENERATION = "generation_config.json"


def check_tokenizers(recipe: Recipe, inputs: Inputs) -> Planned[TokenizerMemory]:
    """Notes on inputs with other token ids, for recipes without a tokenizer_source.

    Returns: the bytes that this took.
    """
    keeper = _tokenizer_donor(recipe, inputs)
    donor = keeper.checkpoint
    names = donor.side_files() if donor.own_tokenizer is None else ()
    if not has_tokenizer(donor.tokenizer_path) and not any("token" in name or "vocab" in name for name in names):
        none = f"{donor.ref.text} has no tokenizer files; the result will have none"
        return Planned(TokenizerMemory(), notes=(none,))
    notes = []
    if keeper is not inputs.donor and recipe.tokenizer_donor is None:
        notes.append(f"{inputs.donor.ref.text} has no tokenizer files; those of {donor.ref.text} are taken")
    ours, largest = Path(donor.tokenizer_path) / _FILE, 0
    for model in inputs.all:
        theirs = Path(model.checkpoint.tokenizer_path) / _FILE
        if not ours.is_file() or not theirs.is_file() or filecmp.cmp(ours, theirs, shallow=False):
            continue
        largest = max(largest, ours.stat().st_size, theirs.stat().st_size)
        difference = _difference(ours, theirs)
        if difference is not None:
            said = f"the tokenizers of {model.ref.text} and {donor.ref.text} differ: {difference}"
            notes.append(
                f"{said}; embedding rows are merged by number, and the tokenizer is that of {donor.ref.text} "
                '("tokenizer_source: base" or "union" arranges them by token)'
            )
    return Planned(compared_memory(largest), notes=tuple(notes))


def _tokenizer_donor(recipe: Recipe, inputs: Inputs) -> Input:
    """The recipe's choice, or the config's donor; if that has no tokenizer, the first that has one and as many rows."""
    if recipe.tokenizer_donor is not None:
        return inputs.all[inputs.place(recipe.tokenizer_donor)]
    having = [model for model in inputs.all if has_tokenizer(model.checkpoint.tokenizer_path)]
    if not having or having[0] is inputs.donor:
        return inputs.donor
    rows = _rows(inputs.donor)
    return next((model for model in having if rows and _rows(model) == rows), inputs.donor)


def _rows(model: Input) -> int:
    """Of the embedding; 0 for a model without one."""
    return next((ref.shape[0] for name, ref in model.tensors.items() if is_embedding(name) and ref.shape), 0)


def copied_files(recipe: Recipe, inputs: Inputs, vocabulary: Vocabulary | None) -> Planned[tuple[SideFile, ...]]:
    """The files copied into the output: tokenizer, templates, generation and processor files, code."""
    said = Said()
    donor = inputs.donor.checkpoint
    keeper = _tokenizer_donor(recipe, inputs).checkpoint
    if vocabulary is not None:
        keeper = donor if vocabulary.owner is None else inputs.all[vocabulary.owner].checkpoint
    template = said.take(_template(recipe, inputs))
    others = [name for name in donor.side_files() if not _goes_with_tokenizer(name, donor.path)]
    copied = [SideFile.copy(name, f"{donor.path}/{name}") for name in others]
    if code := code_files(donor.path):
        said.notes.append(f"copied with {donor.ref.text}: code that auto_map names ({some(list(code))})")
    said.notes += _lacking(inputs, others)
    copied = [*copied, *said.take(_generation(keeper, donor, vocabulary))]
    if vocabulary is None and template is None:
        directory = keeper.tokenizer_path
        names = [name for name in list_side_files(directory) if _goes_with_tokenizer(name, directory)]
        kept = (SideFile.copy(name, f"{directory}/{name}") for name in names if name != _GENERATION)
        return said.with_value((*kept, *copied))
    if vocabulary is None and not has_tokenizer(keeper.tokenizer_path):
        message = f"{keeper.ref.text} has no tokenizer, which a chat template needs."
        hint = "Name a tokenizer_source that has one."
        said.problems.append(Problem(message, recipe.where("chat_template"), hint))
        return said.with_value(())
    tokenizer = vocabulary.tokenizer if vocabulary else read_tokenizer(keeper.tokenizer_path, keeper.ref.text)
    changed = None if vocabulary is None else vocabulary.changed
    return said.with_value((*said.take(tokenizer_files(tokenizer, changed, template)), *copied))


def _generation(keeper: Checkpoint, donor: Checkpoint, vocabulary: Vocabulary | None) -> Planned[tuple[SideFile, ...]]:
    """generation_config.json, with the token ids of the output's vocabulary."""
    owner = next((one for one in (keeper, donor) if _GENERATION in one.side_files()), None)
    if owner is None:
        return Planned(())
    source = f"{owner.path}/{_GENERATION}"
    if vocabulary is None or (vocabulary.owner is not None and owner is keeper):
        return Planned((SideFile.copy(_GENERATION, source),))
    config = vocabulary.adapted(read_json(source, unique=False))
    text = json.dumps(config.value, indent=2, ensure_ascii=False) + "\n"
    return Planned((SideFile(_GENERATION, text=text),), notes=config.notes)


def _goes_with_tokenizer(name: str, directory: str) -> bool:
    """The generation config has token ids, so it comes from the tokenizer's model."""
    return is_tokenizer_file(name) or name == _GENERATION or name in tokenizer_code(directory)


def _lacking(inputs: Inputs, names: Sequence[str]) -> Iterator[str]:
    """Notes on other inputs' files about how the model is used, if the donor lacks them."""
    for model in inputs.all[1:]:
        path = model.checkpoint.path
        lacking = [
            name
            for name in model.checkpoint.side_files()
            if name not in names and name.endswith((".json", ".py")) and not _goes_with_tokenizer(name, path)
        ]
        if lacking:
            yield (
                f"not copied, as {inputs.donor.ref.text} gives config.json and lacks them: {some(lacking)} of "
                f'{model.ref.text} ("config_donor" chooses)'
            )


def _template(recipe: Recipe, inputs: Inputs) -> Planned[str | None]:
    """The recipe's chat template; None for the tokenizer's own."""
    asked = recipe.chat_template
    if asked != "auto":
        return Planned(asked if asked is None or chat.is_text(asked) else chat.NAMED[asked])
    found = chat.most_common(read_template(model.checkpoint.tokenizer_path) for model in inputs.all)
    if found is None:
        return Planned(None, notes=("chat_template: auto: no model has a chat template; the result has none",))
    return Planned(found[0], notes=(f"chat_template: auto: that of {found[1]} of {len(inputs.all)} models",))


def adapter_notes(inputs: Inputs) -> Iterator[str]:
    """Notes on adapters whose own tokenizer or chat template is not used."""
    for model in inputs.all:
        own, theirs = model.checkpoint.adapter_path, model.checkpoint.tokenizer_path
        if own is None or own == theirs or model.ref.adapter is None or not has_tokenizer(own):
            continue
        differences = [found for found in (_numbering(theirs, own), _other_template(theirs, own)) if found is not None]
        if differences:
            yield (
                f"the adapter {model.ref.adapter.text} came with a tokenizer of its own, which is not taken "
                f'({", and ".join(differences)}): "tokenizer_source: {model.ref.adapter.text}" takes it, and '
                "`merge lora fold --adapter-tokenizer`"
            )


def _other_template(theirs: str, own: str) -> str | None:
    template = read_template(own)
    return "another chat template" if template is not None and template != read_template(theirs) else None


def _numbering(first: str, second: str) -> str | None:
    """How the token ids of two directories differ; None if they do not, or a file is missing."""
    donor, other = Path(first) / _FILE, Path(second) / _FILE
    if not donor.is_file() or not other.is_file() or filecmp.cmp(donor, other, shallow=False):
        return None
    return _difference(donor, other)


def _difference(donor: Path, other: Path) -> str | None:
    """How the token ids differ; None if they do not."""
    ours, theirs = _vocabulary(donor), _vocabulary(other)
    moved = sum(theirs.get(token) != number for token, number in ours.items())
    new = sum(token not in ours for token in theirs)
    return f"{moved:,} tokens are missing or numbered otherwise, {new:,} are new" if moved or new else None


def _vocabulary(path: Path) -> dict[str, int]:
    """token -> id, including added tokens; empty for a file of unknown form"""
    try:
        data: Any = read_json(str(path), unique=False)
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
    except (CheckpointError, ValueError, KeyError, TypeError):
        return {}
