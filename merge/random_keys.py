"""Keys of random numbers, which a plan can compute before a run."""

from __future__ import annotations

import xxhash


def random_key(seed: int, tensor_name: str, model: int) -> int:
    """64 bits that name one model's random numbers in one output tensor."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{tensor_name}\0{model}".encode())
