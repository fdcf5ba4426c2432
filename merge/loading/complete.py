"""Checks that a checkpoint has all weights of the class it is loaded as, so that none starts at random.

transformers leaves out what its own tables call harmless (tied weights, buffers that are computed). Of the rest, what
belongs to one task's head is distinguished from what belongs to the model by the architecture's other classes: a head
is what not all of them have. Llama's `score` is one, its final norm is none.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from merge.errors import CheckpointError
from merge.quoting import excerpt

if TYPE_CHECKING:
    from torch.nn import Module


def check_complete(
    network: Module, found: Mapping[str, Any], path: str, *, new_heads: bool = False, brought: Collection[str] = ()
) -> tuple[str, ...]:
    """Returns the parameters of a new head, which the checkpoint lacks.

    Args:
        found: transformers' loading info: keys that are missing, unexpected, or mismatched in shape.
        new_heads, brought: see load_model.

    Raises:
        CheckpointError: weights are missing, of another shape, or not of this class.
    """
    shapes = {key[0]: key[1:] for key in found["mismatched_keys"]}
    lacking = sorted({*found["missing_keys"], *shapes} - set(brought))
    strange = sorted(found["unexpected_keys"])
    if not lacking and not strange and not found.get("error_msgs"):
        return ()
    relatives = functools.cache(lambda: _names_of_relatives(network))
    bare = f"{network.base_model_prefix}."  # classes with a head put the model under a prefix of its own
    heads = tuple(
        name for name in lacking if new_heads and any(name.removeprefix(bare) not in names for names in relatives())
    )
    lacking = [name for name in lacking if name not in heads]
    kind = type(network).__name__
    if lacking:
        first = lacking[0]
        if first in shapes:
            stored, wanted = (tuple(shape) for shape in shapes[first])
            what = f"{first} is {stored}, and {kind} has {wanted}"
        else:
            what = f"lacks {first} for {kind}"
        raise CheckpointError(
            f"{path}: {what} ({_count(lacking)}). It would start at random. Is the file whole, and was the model saved "
            f"as a {kind}?"
        )
    strange = [name for name in strange if all(name.removeprefix(bare) not in names for names in relatives())]
    if strange:
        raise CheckpointError(
            f"{path}: has {strange[0]}, for which {kind} has no place ({_count(strange)}). The model would be run "
            "without it. Does config.json belong to these weights?"
        )
    if errors := found.get("error_msgs"):
        raise CheckpointError(f"{path}: transformers could not load all weights ({excerpt(str(errors[0]))}).")
    return heads


def check_stored(network: Module, stored: Mapping[str, tuple[int, ...]], path: str) -> None:
    """The same for a model that is not loaded as a whole, from the names and shapes of what a checkpoint stores.

    Says nothing where names differ both ways: transformers renames tensors of some checkpoints when it loads them.

    Raises:
        CheckpointError: as check_complete.
    """
    names: dict[int, list[str]] = {}  # tied tensors are one, under several names
    shapes = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        shapes[name] = tuple(tensor.shape)
    harmless = network._keys_to_ignore_on_load_missing or ()
    missing = [tied[0] for tied in names.values() if not any(_matches(name, stored, harmless) for name in tied)]
    harmless = (*(network._keys_to_ignore_on_load_unexpected or ()), *_ONCE_STORED)
    # Names with a slash belong to module folders of sentence-transformers, outside the network.
    unexpected = [name for name in stored if "/" not in name and not _matches(name, shapes, harmless)]
    mismatched = [(name, shape, shapes[name]) for name, shape in stored.items() if shape != shapes.get(name, shape)]
    if not unexpected or not (missing or mismatched):
        found = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
        check_complete(network, found, path)


# Buffers that older versions of transformers stored in every layer.
_ONCE_STORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def _matches(name: str, known: Collection[str], patterns: Iterable[str]) -> bool:
    return name in known or any(re.search(pattern, name) for pattern in patterns)


def _count(names: Collection[str]) -> str:
    return f"{len(names):,} such tensors" if len(names) > 1 else "1 such tensor"


def _names_of_relatives(network: Module) -> list[frozenset[str]]:
    """Names of parameters and buffers of each class that transformers has for the config, without the model's prefix.

    Nothing is allocated.
    """
    import torch
    from transformers.models.auto import modeling_auto

    mappings = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING")]
    kind = type(network.config)
    classes = {each: None for mapping in mappings if kind in mapping for each in _each(mapping[kind])}
    found = []
    for relative in classes:
        made: Any
        try:
            with torch.device("meta"):
                made = relative(copy.deepcopy(network.config))
        except Exception:  # a class that does not fit this config gives no information
            continue
        prefix = f"{made.base_model_prefix}."
        found.append(frozenset(name.removeprefix(prefix) for name in made.state_dict()))
    return found


def _each(value: object) -> tuple[type, ...]:
    return value if isinstance(value, tuple) else (value,)
