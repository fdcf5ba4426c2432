"""Finds the weight files of a model directory by their names and by its index, if there is one.

The first match wins: model.safetensors; an index of safetensors shards; shards without an index; the only other
safetensors file; then the same for pytorch_model.bin. Anything else is refused with a message on what it seems to be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from merge.checkpoint.files import ADAPTER_CONFIG, read_json
from merge.checkpoint.index import read_index
from merge.errors import CheckpointError
from merge.quoting import some
from merge.recipe.references import GGUF

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.(?P<kind>safetensors|bin)")


@dataclass(frozen=True)
class WeightFiles:
    """Weight files by names relative to the directory, and the index that lists them, if any, with its weight_map."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None  # tensor -> file
    notes: tuple[str, ...] = ()


def find_weights(directory: str) -> WeightFiles:
    """The weight files of a directory; for an index, the shards that it names.

    Raises:
        CheckpointError: no directory, or none, too few or several sets of weights in it.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror or error}).") from None
    weights = _choose(directory, names)
    if weights is None:
        if ADAPTER_CONFIG in names:
            raise stands_alone(directory)
        raise CheckpointError(f"{directory}: {_what_it_is(names)}")
    return weights


def _choose(directory: str, names: Sequence[str]) -> WeightFiles | None:
    for single, kind in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        indexes = [name for name in names if name.endswith(f".{kind}.index.json")]
        standard = f"{single}.index.json"
        if single in names:
            note = f"has {single} and {standard}; {single} is read" if standard in names else None
            return WeightFiles((single,), notes=(note,) if note else ())
        if standard in names or len(indexes) == 1:
            index = standard if standard in names else indexes[0]
            weight_map = read_index(directory, index)
            return WeightFiles(tuple(sorted(set(weight_map.values()))), index, weight_map)
        shards = _shards(directory, [name for name in names if name.endswith(f".{kind}")], single.partition(".")[0])
        if shards:
            return shards
        if kind == "safetensors":
            strange = ("adapter_", "consolidated.")  # Mistral's own format names tensors differently
            others = [name for name in names if name.endswith(".safetensors") and not name.startswith(strange)]
            if len(others) > 1:
                raise CheckpointError(
                    f"{directory}: has {len(others)} safetensors files ({some(others)}) and neither model.safetensors "
                    "nor model.safetensors.index.json. Keep the one to be read, or add the index."
                )
            if others:
                return WeightFiles((others[0],))
    return None


def _shards(directory: str, names: Sequence[str], stem: str) -> WeightFiles | None:
    """Shards without an index, such as model-00001-of-00002.safetensors: all of them must exist."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbered = sets.setdefault((match["stem"], int(match["count"])), {})
            number = int(match["number"])
            if number in numbered:
                raise CheckpointError(
                    f"{directory}: {numbered[number]} and {name} have one number. Remove the one that is wrong."
                )
            numbered[number] = name
    preferred = [key for key in sets if key[0] == stem] or list(sets)
    if not preferred:
        return None
    if len(preferred) > 1:
        first = [next(iter(sets[key].values())) for key in preferred]
        raise CheckpointError(f"{directory}: has several sets of shards ({some(first)}). Keep the one to be read.")
    (_, count), found = preferred[0], sets[preferred[0]]
    wrong = [name for number, name in found.items() if not 1 <= number <= count]
    missing = [number for number in range(1, min(count, 100_000) + 1) if number not in found]
    if wrong or missing:
        what = f"shard {missing[0]:05d} is not there" if missing else f"{wrong[0]} is not one of them"
        raise CheckpointError(
            f"{directory}: expected {count} shards, found {len(found)} ({what}). Download the missing files again."
        )
    files = tuple(found[number] for number in sorted(found))
    return WeightFiles(files, notes=(f"no index; all {count} shards are read",))


def _what_it_is(names: Sequence[str]) -> str:
    """Why there are no weights to read, and what to do."""
    if found := [name for name in names if name.endswith(GGUF)]:
        return f"holds GGUF weights ({some(found)}). Name the file itself: {found[0]}."
    if "modules.json" in names:
        return (
            "holds a sentence-transformers model whose weights are in a subfolder. Name that folder "
            "(0_Transformer), and copy the modules beside it yourself."
        )
    if found := [name for name in names if name.startswith("consolidated.")]:
        return f"holds weights in their publisher's own format ({some(found)}). Convert them to Hugging Face's format."
    endings = (".h5", ".msgpack", ".onnx", ".ckpt", ".pt", ".pth", ".bin")
    if found := [name for name in names if name.endswith(endings)]:
        return f"has no weights that can be read, only {some(found)}. Save the model as safetensors."
    if not names:
        return "is empty. Name a directory with config.json and model.safetensors."
    return (
        f"has no weights in it, only {some(list(names))}. Expected model.safetensors, its shards or pytorch_model.bin."
    )


def stands_alone(directory: str) -> CheckpointError:
    """The error for an adapter where a whole model is expected."""
    try:
        base = read_json(os.path.join(directory, ADAPTER_CONFIG), unique=False).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    base = base if isinstance(base, str) and base else "BASE"
    return CheckpointError(
        f'{directory}: is an adapter ({ADAPTER_CONFIG}), not a whole model. Write "{base}+{directory}", which stands '
        "for its base model with the adapter folded in."
    )
