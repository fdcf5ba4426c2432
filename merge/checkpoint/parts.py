"""The tensors that belong to a quantised weight: found, checked, and taken out of the model's list."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import Derived, Stored, TensorRef
from merge.quoting import counted, quoted, some

FLOATS = ("F32", "F16", "BF16")
_AGAIN = "Download all files again."
_MOST_TEXT = 1 << 16  # bytes of a description that lies in a tensor; real ones have a few hundred


class WeightParts:
    """A model's tensors, of which a format takes the parts of its weights and puts the weights in their places.

    Args:
        format_: its name, for messages.
        path: the model's directory.
    """

    def __init__(self, format_: str, path: str, tensors: Mapping[str, TensorRef]) -> None:
        self.format, self.path, self.tensors = format_, path, tensors
        self._weights: dict[str, Derived] = {}  # name of what is replaced -> the weight
        self._used: set[str] = set()

    def find(self, name: str) -> TensorRef | None:
        """A part that need not be there."""
        found = self.tensors.get(name)
        if found is not None:
            self._used.add(name)
        return found

    def take(self, weight: TensorRef, name: str) -> TensorRef:
        """A part of a weight without which it means nothing."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(
                f"{weight.file}: {weight.name}: {self.format} without {name}, which is in none of the model's files. "
                "Download all files again, or name the model in bf16."
            )
        return found

    def put(self, packed: TensorRef, weight: Derived) -> None:
        """The weight, in place of what it is packed in."""
        if weight.name != packed.name and weight.name in self.tensors:
            raise CheckpointError(
                f"{packed.file}: {packed.name}: the model also has {weight.name}, which is what it would be read as. "
                "Remove the one that does not belong to this checkpoint."
            )
        self._weights[packed.name] = weight
        self._used.add(packed.name)

    def rest(self) -> dict[str, TensorRef]:
        """The model as it is read: weights where their packed forms were, parts left out."""
        found: dict[str, TensorRef] = {}
        for name, ref in self.tensors.items():
            if name in self._weights:
                weight = self._weights[name]
                found[weight.name] = weight
            elif name not in self._used:
                found[name] = ref
        return found

    def done(self, suffixes: Sequence[str]) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
        """`rest`, and a note; what is called like a part and belongs to no weight is an error.

        Args:
            suffixes: ends of the names of parts.
        """
        found = self.rest()
        orphans = [name for name in found if name.endswith(tuple(suffixes)) and name not in self._read_as]
        if orphans:
            raise CheckpointError(
                f"{found[orphans[0]].file}: {some(orphans)}: {self.format}: belongs to no weight of "
                f"this model. {_AGAIN}"
            )
        if not self._weights:
            raise CheckpointError(
                f"{self.path}/config.json: quantization_config says {self.format}, but no tensor is stored so. Remove "
                "quantization_config if the weights are plain numbers; else download all files again."
            )
        return found, self.note()

    def note(self) -> tuple[str, ...]:
        return (f"{self.format}: {counted(len(self._weights), 'weight')} decoded while reading",)

    @property
    def _read_as(self) -> set[str]:
        return {weight.name for weight in self._weights.values()}


def check_dtype(ref: TensorRef, dtypes: Sequence[str]) -> None:
    if ref.dtype not in dtypes:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: dtype {ref.dtype}, expected {' or '.join(dtypes)}. Dequantise the "
            "model first, or download the file again."
        )


def check_shape(ref: TensorRef, shape: Sequence[int], weight: str) -> None:
    """Raises CheckpointError unless a part has the shape that its weight asks for."""
    if ref.shape != tuple(shape):
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {quoted(list(ref.shape))} does not fit {weight}; expected {quoted(list(shape))}. "
            f"{_AGAIN}"
        )


def as_bytes(ref: TensorRef) -> TensorRef:
    """The bytes of a stored tensor, as a vector."""
    if not isinstance(ref, Stored):
        raise CheckpointError(
            f"{ref.file}: {ref.name}: is transposed or sliced in a pickle, which is not read for packed weights. Save "
            "the model as safetensors."
        )
    return dataclasses.replace(ref, dtype="U8", shape=(ref.nbytes,))


def small_text(ref: TensorRef) -> bytes:
    """The bytes of a small tensor, which formats use for what belongs into a header: no number of the model is read."""
    stored = as_bytes(ref)
    assert isinstance(stored, Stored)
    if stored.nbytes > _MOST_TEXT:
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {stored.nbytes:,} bytes; a description of a weight has at most {_MOST_TEXT:,}. "
            f"{_AGAIN}"
        )
    try:
        with open(ref.file, "rb", buffering=0) as file:
            file.seek(stored.offset, os.SEEK_SET)
            found = file.read(stored.nbytes)
    except OSError as error:
        raise CheckpointError(f"{ref.file}: {ref.name}: cannot be read ({error.strerror or error}).") from None
    if len(found) != stored.nbytes:
        raise CheckpointError(f"{ref.file}: {ref.name}: the file ends before it does. {_AGAIN}")
    return found


def check_sizes(shape: object, ref: TensorRef) -> tuple[int, ...]:
    """A shape that a file declares, as sizes that a tensor can have."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > 8
        or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
        or math.prod(shape) * DTYPES["F64"].itemsize >= 1 << 62
    ):
        raise CheckpointError(f"{ref.file}: {ref.name}: {quoted(shape)} is no tensor's shape. {_AGAIN}")
    return tuple(shape)
