"""Lists every model that a recipe names, once, with its line."""

from __future__ import annotations

from merge.recipe.model import ModelRef, Module, Recipe

Key = tuple[str, str | None, "Key | None"]


def key_of(ref: ModelRef) -> Key:
    return ref.path, ref.revision, key_of(ref.adapter) if ref.adapter is not None else None


def mentioned(recipe: Recipe) -> dict[Key, tuple[ModelRef, str | None]]:
    """Every model, once, with its place in the recipe: config donor, base, then as they are listed."""
    listed: list[tuple[ModelRef, int]] = []
    parts: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    for part in parts:
        listed += [(source.model, source.line) for source in part.models]
        for piece in part.slices:
            listed += [(piece.base_model, piece.line)] if piece.base_model is not None else []
            listed += [(source.model, source.line) for source in piece.sources]
    for key in ("base_model", "config_donor"):
        ref: ModelRef | None = getattr(recipe, key)
        if ref is not None:
            listed.insert(0, (ref, recipe.lines.get(key, 0)))
    unique: dict[Key, tuple[ModelRef, str | None]] = {}
    for ref, line in listed:
        unique.setdefault(key_of(ref), (ref, f"{recipe.file}:{line}" if recipe.file and line else recipe.file))
    return unique
