"""What a recipe's text says by itself, before anything is looked for."""

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
    """A recipe as it is written: nothing was looked for yet, on the disk or the hub.

    Attributes:
        recipe: its references are as written; see ModelRef.
        reader: where everything stands, and what is wrong with the text.
    """

    recipe: Recipe
    reader: RecipeReader


def draft_of(
    root: yaml.MappingNode, text: str, file: str | None, stages: StageNames | None = None, compat: str | None = None
) -> Draft:
    """A document's tree -> Draft, by its text alone; `stages`: what the other documents of its file are called."""
    reader = RecipeReader(file, all_methods(), stages, compat or written_compat(root))
    return Draft((build_mixture if is_mixture(root) else build)(reader, root, text), reader)
