"""The tokenizer files of the output; and notes on inputs that number tokens otherwise, where nothing arranges them."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

from merge.checkpoint.files import read_json
from merge.errors import CheckpointError, Problem
from merge.plan import SideFile
from merge.planners.inputs import Inputs
from merge.planners.token_rows import Vocabulary
from merge.recipe.model import Recipe
from merge.vocabulary import chat
from merge.vocabulary.files import is_tokenizer_file, tokenizer_files
from merge.vocabulary.tokenizer import has_tokenizer, read_template, read_tokenizer

_FILE = "tokenizer.json"
_GENERATION = "generation_config.json"


def check_tokenizers(inputs: Inputs) -> None:
    """A note for every input that numbers tokens otherwise, for recipes that do not ask for an order of tokens."""
    donor = inputs.donor.checkpoint
    if not has_tokenizer(donor.path) and not any("token" in name or "vocab" in name for name in donor.side_files()):
        inputs.notes.append(f"{donor.ref.text} has no tokenizer files; the result will have none")
        return
    for model in inputs.all:
        difference = _difference(Path(donor.path) / _FILE, Path(model.checkpoint.path) / _FILE)
        if difference is not None:
            said = f"the tokenizers of {model.ref.text} and {donor.ref.text} differ: {difference}"
            inputs.notes.append(
                f"{said}; embedding rows are merged by number, and the tokenizer is that of {donor.ref.text} "
                '("tokenizer_source: base" or "union" arranges them by token)'
            )


def copied_files(
    recipe: Recipe, inputs: Inputs, vocabulary: Vocabulary | None, problems: list[Problem]
) -> tuple[SideFile, ...]:
    """Tokenizer, chat template and generation files of the output."""
    donor = inputs.donor.checkpoint
    template = _template(recipe, inputs)
    if vocabulary is None and template is None:
        return tuple(SideFile(file, source=f"{donor.path}/{file}") for file in donor.side_files())
    if vocabulary is None and not has_tokenizer(donor.path):
        said = f"{donor.ref.text} has no tokenizer for the chat template to go with."
        problems.append(Problem(said, recipe.where("chat_template"), "Name a tokenizer_source that has one."))
        return ()
    tokenizer = read_tokenizer(donor.path, donor.ref.text) if vocabulary is None else vocabulary.tokenizer
    changed = None if vocabulary is None else vocabulary.changed
    files = tokenizer_files(tokenizer, changed, template, inputs.notes)
    keeper = donor if vocabulary is None or vocabulary.owner is None else inputs.all[vocabulary.owner].checkpoint
    others = [name for name in keeper.side_files() if not is_tokenizer_file(name)]
    if vocabulary is not None and vocabulary.owner is None and _GENERATION in others:
        others.remove(_GENERATION)
        config = vocabulary.adapted(read_json(f"{keeper.path}/{_GENERATION}", unique=False), inputs.notes)
        files += (SideFile(_GENERATION, text=json.dumps(config, indent=2, ensure_ascii=False) + "\n"),)
    return (*files, *(SideFile(name, source=f"{keeper.path}/{name}") for name in others))


def _template(recipe: Recipe, inputs: Inputs) -> str | None:
    """The chat template that the recipe asks for; None for the tokenizer's own."""
    asked = recipe.chat_template
    if asked != "auto":
        return asked if asked is None or chat.is_text(asked) else chat.NAMED[asked]
    found = chat.most_common(read_template(model.checkpoint.path) for model in inputs.all)
    if found is None:
        inputs.notes.append("chat_template: auto: no model has a chat template; the result has none")
        return None
    inputs.notes.append(f"chat_template: auto: that of {found[1]} of {len(inputs.all)} models")
    return found[0]


def _difference(donor: Path, other: Path) -> str | None:
    """What differs in the numbering; None if it is the same, or cannot be compared because a file is missing."""
    if not donor.is_file() or not other.is_file() or filecmp.cmp(donor, other, shallow=False):
        return None
    ours, theirs = _vocabulary(donor), _vocabulary(other)
    moved = sum(theirs.get(token) != number for token, number in ours.items())
    new = sum(token not in ours for token in theirs)
    return f"{moved:,} tokens are missing or numbered otherwise, {new:,} are new" if moved or new else None


def _vocabulary(path: Path) -> dict[str, int]:
    """token -> number, added tokens included; empty for a file that is not understood"""
    try:
        data: Any = read_json(str(path), unique=False)
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
    except (CheckpointError, ValueError, KeyError, TypeError):
        return {}
