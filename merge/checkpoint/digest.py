"""Digests of source tensors as they are now, to compare with those that were noted when they were read."""

from __future__ import annotations

import numpy as np

from merge.checkpoint.reader import SourceReader
from merge.chunks import Chunks, digest_of, tensor_digest
from merge.dtypes import DTYPES
from merge.plan import TensorRef


def stored_digest(reader: SourceReader, ref: TensorRef) -> str:
    """Of a tensor's bytes as they are stored, read a chunk at a time."""
    data = np.empty(Chunks.of(ref.shape).length, DTYPES[ref.dtype].numpy_name)

    def read(start: int, stop: int) -> memoryview:
        piece = data[: stop - start]
        reader.read_into(ref, start, piece)
        return piece.data

    return digest_of(ref.shape, read)


def value_digest(reader: SourceReader, ref: TensorRef) -> str:
    """Of all that a tensor's values follow from: its bytes with its FP8 scales; of a derived one, its values."""
    if ref.derived is None:
        parts = [stored_digest(reader, part) for part in (ref, ref.scale) if part is not None]
        return parts[0] if len(parts) == 1 else tensor_digest([bytes.fromhex(part) for part in parts])
    data = np.empty(Chunks.of(ref.shape).length, np.float32)

    def read(start: int, stop: int) -> memoryview:
        piece = data[: stop - start]
        reader.read_values(ref, start, piece)
        return piece.data

    return digest_of(ref.shape, read)
