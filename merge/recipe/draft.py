"""A recipe as its text alone says, before anything is looked up."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from merge.methods.registry import all_methods
from merge.recipe.build import build, written_compat
from merge.recipe.mixture import build_mixture, is_mixture
from merge.recipe.model import Recipe
from merge.recipe.reader import RecipeReader
from merge.recipe.references import StageNames


@dataclass(frozen=True)
class Draft:
    """A recipe as it is written: nothing has been looked up yet, on the disk or the hub.

    Attributes:
        recipe: its references are as written; see ModelRef.
        reader: the lines of all keys, and the problems in the text.
    """

    recipe: Recipe
    reader: RecipeReader


def draft_of(
    root: yaml.MappingNode, text: str, file: str | None, stages: StageNames | None = None, compat: str | None = None
) -> Draft:
    """A document's tree -> Draft, from its text alone; `stages`: the names of the other documents in the file."""
    reader = RecipeReader(file, all_methods(), stages, compat or written_compat(root))
    return Draft((build_mixture if is_mixture(root) else build)(reader, root, text), reader)
