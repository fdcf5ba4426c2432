"""Chunks: the fixed pieces of a tensor that digests and sums are made of, so that no result depends on block size.

A chunk is as many whole rows (last dimension) as fit into CHUNK elements, at least one; of a vector, CHUNK elements.
A tensor's digest is xxh3-128 over the xxh3-128 digests of its chunks in order; chunks can be hashed on any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

CHUNK = 1 << 17  # elements; four bf16 inputs and a float32 result of one chunk fit a second-level cache


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a tensor of `size` elements is cut: every chunk has `length` elements, the last one the rest."""

    size: int
    length: int

    @staticmethod
    def of(shape: Sequence[int]) -> Chunks:
        size = math.prod(shape)
        row = shape[-1] if len(shape) > 1 and size else 1  # of [0, 2^40] no row is there
        return Chunks(size, max(1, CHUNK // row) * row)

    @property
    def count(self) -> int:
        return -(-self.size // self.length)

    def span(self, first: int, n: int = 1) -> tuple[int, int]:
        """(start, stop) in elements of n chunks from `first`."""
        return first * self.length, min((first + n) * self.length, self.size)


def chunk_digest(data: memoryview | bytes) -> bytes:
    """16 bytes for one chunk's stored bytes."""
    return xxhash.xxh3_128_digest(data)


def digest_of(shape: Sequence[int], read: Callable[[int, int], memoryview]) -> str:
    """Digest of a stored tensor; read(start, stop) gives the bytes of its elements start .. stop."""
    chunks = Chunks.of(shape)
    return tensor_digest([chunk_digest(read(*chunks.span(chunk))) for chunk in range(chunks.count)])


def tensor_digest(chunk_digests: Sequence[bytes]) -> str:
    """Hexadecimal digest of a tensor from those of its chunks, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(chunk_digests))
