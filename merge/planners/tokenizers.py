"""Whether the inputs number their tokens alike: rows of embeddings are merged by number, so they had better."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

from merge.checkpoint import Checkpoint
from merge.errors import Problem
from merge.planners.inputs import Inputs
from merge.recipe.model import Recipe

_FILE = "tokenizer.json"


def tokenizer_donor(recipe: Recipe, inputs: Inputs) -> Checkpoint:
    """The model whose tokenizer and template files are copied: the one named, else the base, else the first."""
    for model in inputs.all:
        if recipe.tokenizer_source in (model.ref.text, model.ref.path):
            return model.checkpoint
    return inputs.donor.checkpoint


def check_tokenizers(recipe: Recipe, inputs: Inputs, problems: list[Problem], notes: list[str]) -> None:
    """A note for every input that numbers tokens otherwise; a problem if the recipe asks for them to be aligned."""
    donor = tokenizer_donor(recipe, inputs)
    if not (Path(donor.path) / _FILE).is_file() and not any(
        "token" in name or "vocab" in name for name in donor.side_files()
    ):
        if recipe.tokenizer_source is not None:
            said = f"{donor.ref.text} has no tokenizer files (tokenizer.json, tokenizer.model, vocab.json ...)."
            problems.append(Problem(said, recipe.where("tokenizer_source"), "Name a model that has them."))
        notes.append(f"{donor.ref.text} has no tokenizer files; the result will have none")
        return
    for model in inputs.all:
        difference = _difference(Path(donor.path) / _FILE, Path(model.checkpoint.path) / _FILE)
        if difference is None:
            continue
        said = f"the tokenizers of {model.ref.text} and {donor.ref.text} differ: {difference}"
        if recipe.tokenizer_source is not None:
            hint = (
                "Aligning vocabularies comes with a later version; without tokenizer_source rows are merged by number."
            )
            problems.append(Problem(said + ".", recipe.where("tokenizer_source"), hint))
        else:
            notes.append(f"{said}; embedding rows are merged by number, and the tokenizer is that of {donor.ref.text}")


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
        data: Any = json.loads(path.read_bytes())
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError):
        return {}
