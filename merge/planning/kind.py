"""Finds out whether a recipe's inputs are LoRA adapters; then its result is one too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from merge.errors import CheckpointError
from merge.recipe.model import ModelRef, Source


def is_adapter_ref(ref: ModelRef) -> bool:
    """Whether a reference is an adapter on its own: a directory, or a repository of the hub, that holds no model."""
    from merge.adapters.files import is_adapter  # recipes of models do not need it
    from merge.checkpoint.hub import locate

    if ref.adapter is not None or not ref.path:
        return False
    if os.path.isdir(ref.path):
        return is_adapter(ref.path)
    try:
        return is_adapter(locate(ref, adapter=True).path)
    except CheckpointError:  # the problem is reported when it is opened as a model
        return False


def are_adapters(
    models: Iterable[Source], base: ModelRef | None, is_adapter: Callable[[ModelRef], bool] = is_adapter_ref
) -> bool:
    """Whether there are models besides the base, and all of them are adapters."""
    apart = [source.model for source in models if source.model != base]
    return bool(apart) and all(map(is_adapter, apart))
