"""Whether a recipe's inputs are LoRA adapters, so that its result is one too."""

from __future__ import annotations

import os
from collections.abc import Iterable

from merge.errors import CheckpointError
from merge.recipe.model import ModelRef, Source


def adapters_of(models: Iterable[Source], base: ModelRef | None) -> tuple[Source, ...]:
    """The sources, without the base if it is listed, where all of them are adapters; else ()."""
    sources = tuple(source for source in models if source.model != base)
    return sources if all(is_adapter_ref(source.model) for source in sources) else ()


def is_adapter_ref(ref: ModelRef) -> bool:
    """Whether a reference is an adapter on its own: a directory, or a repository of the hub, that holds no model."""
    from merge.checkpoint.adapter import is_adapter  # recipes of models do not need it
    from merge.checkpoint.hub import locate

    if ref.adapter is not None or not ref.path:
        return False
    if os.path.isdir(ref.path):
        return is_adapter(ref.path)
    try:
        return is_adapter(locate(ref, adapter=True).path)
    except CheckpointError:  # what stands in the way is told when it is opened as a model
        return False
