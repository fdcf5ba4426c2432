"""What mergekit's schema has and this version does not do: refused by name, never ignored.

Everything here is parsed first, so that the refusal names the right line. To build a feature, delete its lines here.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge.recipe.model import ModelRef, Recipe

_LATER = "with a later version; nothing was merged"
SEVERAL_DOCUMENTS = f"a second document starts here: recipes of several documents come {_LATER}"

# Keys that only a refusal reads, by the level they stand at.
KEYS: dict[str, dict[str, str]] = {
    "slice": {
        "merge_method": f"a merge_method for each slice comes {_LATER}",
        "residual_weight": "residual_weight has no effect in mergekit and none here; remove it",
    },
    "reference": {"override_architecture": f"override_architecture comes {_LATER}"},
}


def refusals(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key path in Recipe.lines, message) of everything asked for that would be done wrongly or not at all."""
    for path, model in references(recipe):
        if model.adapter is not None:
            yield path, f'adapters ("{model.text}") come {_LATER}'
    yield from _tokenizer(recipe)
    if recipe.chat_template is not None:
        yield "chat_template", f"chat_template comes {_LATER}"
    for name in recipe.modules:
        yield f"modules.{name}", f'recipes by module ("{name}") come {_LATER}'


def _tokenizer(recipe: Recipe) -> Iterator[tuple[str, str]]:
    # The tokenizer of a model in the recipe is copied; anything else would have to rearrange the embeddings.
    donors = ("base", *(model.text for _, model in references(recipe)))
    key = "tokenizer_source" if recipe.tokenizer is None else "tokenizer"
    if recipe.tokenizer_source == "union":
        yield key, f"the union of all tokenizers comes {_LATER}"
    elif recipe.tokenizer_source is not None and recipe.tokenizer_source not in donors:
        yield key, f'a tokenizer from a model that is not merged ("{recipe.tokenizer_source}") comes {_LATER}'
    for name in recipe.tokenizer or ():
        if name != "source":
            yield f"tokenizer.{name}", f'"{name}" of a tokenizer comes {_LATER}'


def references(recipe: Recipe) -> Iterator[tuple[str, ModelRef]]:
    """(key path, model) of the base and of every model that is listed, in the recipe's order; not inside modules."""
    if recipe.base_model is not None:
        yield "base_model", recipe.base_model
    for i, source in enumerate(recipe.models):
        yield f"models.{i}.model", source.model
    for i, piece in enumerate(recipe.slices):
        if piece.base_model is not None:
            yield f"slices.{i}.base_model", piece.base_model
        for j, source in enumerate(piece.sources):
            yield f"slices.{i}.sources.{j}.model", source.model
