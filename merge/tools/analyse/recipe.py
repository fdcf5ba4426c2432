"""The suggestion as a recipe's text, with its reasons, planned once so that it is known to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from merge.errors import MergeError
from merge.jobs.build import build_plan
from merge.planning.load import parse_recipe
from merge.quoting import clipped
from merge.recipe.model import ModelRef, Recipe, Source
from merge.recipe.text import text_of
from merge.tools.analyse.suggest import RecipeChoice


@dataclasses.dataclass(frozen=True)
class SuggestedRecipe:
    """`text`: YAML, None where there is nothing to merge or it cannot be planned; `problem`: why not."""

    text: str | None
    problem: str | None = None


def suggested_recipe(base: ModelRef, models: Sequence[ModelRef], choice: RecipeChoice) -> SuggestedRecipe:
    """Paths are those that the models were named by."""
    if len(choice.models) < 2:
        return SuggestedRecipe(None)
    recipe = Recipe(
        choice.method,
        models=tuple(Source(models[place]) for place in choice.models),
        base_model=base,
        parameters=choice.parameters,
        dtype=choice.dtype,
        tokenizer_source=choice.tokenizer,
    )
    reasons = [f"{each.about}: {each.text} ({each.reason}; {each.source})" for each in choice.suggestions]
    comments = ["Suggested by `merge analyse`; measure it against its parents with `merge eval`.", *reasons]
    text = "".join(f"# {clipped(line, 500)}\n" for line in comments for line in line.splitlines()) + text_of(recipe)
    try:
        build_plan(parse_recipe(text))
    except MergeError as error:
        return SuggestedRecipe(None, f"the suggested recipe ({choice.method}) cannot be planned: {error}")
    return SuggestedRecipe(text)
