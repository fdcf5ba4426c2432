"""Mixes data sets by weight, and holds out a part; both depend only on the seed, on every machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from finetune.data.contents import Sample


def mix(sets: Sequence[Sequence[Sample]], weights: Sequence[float | None], seed: int) -> list[Sample]:
    """All samples once if there are no weights; else the same number of samples, in the proportion of the weights.

    A set that is too small is repeated, and the rest drawn at random; of a set that is too large, a part is drawn.
    """
    if not weights or weights[0] is None:
        return [sample for samples in sets for sample in samples]
    total, scale = sum(map(len, sets)), sum(weight or 0.0 for weight in weights)
    mixed: list[Sample] = []
    for number, (samples, weight) in enumerate(zip(sets, weights, strict=True)):
        wanted = max(1, round(total * (weight or 0.0) / scale))
        rounds, rest = divmod(wanted, len(samples))
        drawn = sorted(random.Random(f"{seed}:mix:{number}").sample(range(len(samples)), rest))
        mixed += list(samples) * rounds + [samples[i] for i in drawn]
    return mixed


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): those whose content has the smallest hashes are held out, so equal ones stay together."""
    ranks = [
        hashlib.sha256(f"{seed}:{sample.content!r}".encode("utf-8", "surrogatepass")).digest() for sample in samples
    ]
    wanted = max(1, round(share * len(samples)))
    limit = sorted(ranks)[wanted - 1]
    held = [rank <= limit for rank in ranks]
    return (
        [sample for sample, out in zip(samples, held, strict=True) if not out],
        [sample for sample, out in zip(samples, held, strict=True) if out],
    )
