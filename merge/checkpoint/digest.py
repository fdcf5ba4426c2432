"""Digests of source tensors in their present state, to compare with those recorded earlier."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import xxhash

from merge.checkpoint.reader import SourceReader
from merge.chunks import Chunks, digest_of
from merge.dtypes import DTYPES
from merge.plan import TensorRef


def stored_digest(reader: SourceReader, ref: TensorRef) -> str:
    """Digest of a tensor's stored bytes, read a chunk at a time."""
    data = np.empty(Chunks.of(ref.shape).length, DTYPES[ref.dtype].numpy_name)

    def read(start: int, stop: int) -> memoryview:
        piece = data[: stop - start]
        reader.read_into(ref, start, piece)
        return piece.data

    return digest_of(ref.shape, read)


def value_digest(reader: SourceReader, ref: TensorRef) -> str:
    """Digest of a stored tensor's bytes, or of a derived tensor's values."""
    if ref.is_exact:
        return stored_digest(reader, ref)
    data = np.empty(Chunks.of(ref.shape).length, np.float32)

    def read(start: int, stop: int) -> memoryview:
        piece = data[: stop - start]
        reader.read_values(ref, start, piece)
        return piece.data

    return digest_of(ref.shape, read)


def file_digest(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
