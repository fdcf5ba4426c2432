"""What the measures say against a merge: models of another base, duplicates, deltas that are empty or too small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.tools.analyse.elements import pairs_of
from merge.tools.analyse.results import AnalysedTensor, AnalysisFinding, group_of

# Of two models that were trained apart from each other the cosine of weights is near 0; of fine-tunes it is near 1.
_LEAST_COSINE = 0.7
_FAR = 0.3  # |d| / |b|
_TINY = 1e-4
_SAME = 0.999  # cosine of two deltas
_LOST = 0.5  # share of |d|


def checks(
    models: Sequence[str], tensors: Sequence[AnalysedTensor], digests: Sequence[tuple[str, ...]]
) -> Iterator[AnalysisFinding]:
    """Findings about the models, all tensors taken together.

    Args:
        digests: of all tensors of the base, and of each model.
    """
    yield from _duplicates(models, digests)
    matrices = group_of([tensor for tensor in tensors if len(tensor.shape) > 1], len(models))
    if matrices is None:
        return
    measures = matrices.measures
    for name, one in zip(models, measures.models, strict=True):
        cosine, relative = one.weight_cosine, one.relative
        if not one.norm:
            continue  # said of the digests, or nothing but vectors changed
        if cosine is not None and relative is not None and (cosine < _LEAST_COSINE or relative > 1):
            text = f"is not a fine-tune of this base: cosine of weights {cosine:.3f}, |d|/|b| {relative:.3g}"
            yield AnalysisFinding("problem", "base", (name,), f"{name}: {text}")
        elif relative is not None and relative > _FAR:
            yield AnalysisFinding("warning", "base", (name,), f"{name}: far from the base: |d|/|b| {relative:.3g}")
        elif relative is not None and relative < _TINY:
            yield AnalysisFinding("warning", "tiny delta", (name,), f"{name}: a tiny delta: |d|/|b| {relative:.2g}")
        if one.lost > _LOST:
            text = f"{one.lost:.0%} of |d| is below half a bfloat16 ulp of the base; merge in float32"
            yield AnalysisFinding("warning", "rounding", (name,), f"{name}: {text}")
    for (i, j), pair in zip(pairs_of(len(models)), measures.pairs, strict=True):
        cosine = pair.cosine
        if cosine is not None and cosine > _SAME and digests[i + 1] != digests[j + 1]:
            text = f"{models[i]} and {models[j]}: almost the same delta (cosine {cosine:.5f})"
            yield AnalysisFinding("warning", "duplicate", (models[i], models[j]), text)


def _duplicates(models: Sequence[str], digests: Sequence[tuple[str, ...]]) -> Iterator[AnalysisFinding]:
    """Equal digests: of the base (an empty delta), and of a model that was named before."""
    first: dict[tuple[str, ...], str] = {}
    for name, found in zip(models, digests[1:], strict=True):
        if found == digests[0]:
            yield AnalysisFinding("problem", "empty delta", (name,), f"{name}: every tensor is the base's")
        elif found in first:
            text = f"{name}: every tensor is the same as in {first[found]}"
            yield AnalysisFinding("problem", "duplicate", (name,), text)
        else:
            first[found] = name
