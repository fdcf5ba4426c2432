"""Keys of random numbers, which a plan can compute before a run."""

from __future__ import annotations

import xxhash


def random_key(seed: int, what: str, model: int) -> int:
    """64 bits that name one model's or expert's random numbers in one output tensor, or for one thing in it."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{what}\0{model}".encode())
