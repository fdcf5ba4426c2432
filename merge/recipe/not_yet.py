"""What mergekit's schema has and this version does not do: refused by name, never ignored.

Everything here is parsed first, so that the refusal names the right line. To build a feature, delete its lines here.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge.recipe.model import ModelRef, Module, Recipe

_LATER = "with a later version; nothing was merged"

MIXTURE_KEYS = ("experts", "shared_experts", "gate_mode", "experts_per_token")  # another schema: refused alone
MIXTURE = f"mixtures of experts come {_LATER}"

# Keys that only a refusal reads, by the level they stand at.
KEYS: dict[str, dict[str, str]] = {
    "slice": {
        "residual_weight": "residual_weight has no effect in mergekit and none here; remove it",
    },
}


def refusals(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key path in Recipe.lines, message) of everything asked for that would be done wrongly or not at all."""
    yield from _tokenizer(recipe)
    if recipe.chat_template is not None:
        yield "chat_template", f"chat_template comes {_LATER}"


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
    """(key path, model) of the base and of every model that is listed, in the recipe's order."""
    if recipe.base_model is not None:
        yield "base_model", recipe.base_model
    yield from _listed("", recipe)
    for name, module in recipe.modules.items():
        yield from _listed(f"modules.{name}.", module)


def _listed(prefix: str, part: Recipe | Module) -> Iterator[tuple[str, ModelRef]]:
    for i, source in enumerate(part.models):
        yield f"{prefix}models.{i}.model", source.model
    for i, piece in enumerate(part.slices):
        if piece.base_model is not None:
            yield f"{prefix}slices.{i}.base_model", piece.base_model
        for j, source in enumerate(piece.sources):
            yield f"{prefix}slices.{i}.sources.{j}.model", source.model
