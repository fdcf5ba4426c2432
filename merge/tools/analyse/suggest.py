"""Suggests a method and its parameters from what was measured, with reasons and sources.

The rules are few, and each compares a measure with what chance or one model alone would give. docs/analyse.md has what
was measured of them, on one family: `merge eval` decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from merge.recipe.model import Settings
from merge.tools.analyse.elements import DENSITIES, pairs_of
from merge.tools.analyse.results import AnalysedGroup, AnalysedTensor, AnalysisFinding, Suggestion, group_of, mean

ALIKE = 0.5  # cosine of deltas that point the same way
SHARED = 2.0  # times what random subspaces share
ENERGY = 0.9  # share of |d|^2 that trimming must leave
CALMER = 0.9  # sign conflict among the entries that it leaves, over that among all
LOST = 0.5  # share of |d| that a bfloat16 result may lose
LONGER = 2.0  # one delta over another
VARIES = 1.1  # the largest weight of a layer over the smallest
KNOTS = 5

_LEFT_OUT = ("base", "duplicate", "empty delta", "architecture", "rope")  # models with such a problem

_SOUPS = "Wortsman et al. 2022, arXiv:2203.05482"
_ARITHMETIC = "Ilharco et al. 2023, arXiv:2212.04089"
_TIES = "Yadav et al. 2023, arXiv:2306.01708"
_TSV = "Gargiulo et al. 2024, arXiv:2412.00081"
_MEASURED = "measured here"


@dataclass(frozen=True)
class RecipeChoice:
    """What the suggested recipe is made of; `models` (by place) are fewer than two where there is nothing to merge."""

    suggestions: tuple[Suggestion, ...]
    models: tuple[int, ...]
    method: str = "task_arithmetic"
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: str | None = None


def suggest(
    models: Sequence[str], tensors: Sequence[AnalysedTensor], findings: Sequence[AnalysisFinding]
) -> RecipeChoice:
    """See the module."""
    whole = group_of(tensors, len(models))
    if whole is None:
        return RecipeChoice((), ())
    kept, said = _usable(models, whole, findings)
    if len(kept) < 2:
        text = "nothing to merge" if len(models) > 1 else "name more fine-tunes of this base: one alone is no merge"
        last = Suggestion("method", text, f"{len(kept)} of {len(models)} models can be merged", _MEASURED)
        return RecipeChoice((*said, last), kept)
    parts = _Parts(models, tensors, whole, kept)
    method, parameters, why = parts.method()
    said += [*why, *parts.weights()]
    dtype, reason = parts.dtype(method)
    tokenizer = None
    if any(finding.what == "vocabulary" for finding in findings):
        tokenizer = "union"
        text = "tokenizer_source: union, which maps equal tokens to one row"
        reason.append(Suggestion("tokenizer", text, "the vocabularies differ", _MEASURED))
    return RecipeChoice((*said, *reason), kept, method, parameters, dtype, tokenizer)


def _usable(
    models: Sequence[str], whole: AnalysedGroup, findings: Sequence[AnalysisFinding]
) -> tuple[tuple[int, ...], list[Suggestion]]:
    """The models that a recipe may have, and why the others are left out."""
    said = []
    out: dict[int, None] = {}
    for finding in findings:
        if finding.level == "problem" and finding.what in _LEFT_OUT:
            place = models.index(finding.models[0])
            if place not in out:
                said.append(Suggestion("model", f"leave out {models[place]}", finding.what, _MEASURED))
            out[place] = None
    for (i, j), pair in zip(pairs_of(len(models)), whole.measures.pairs, strict=True):
        if i in out or j in out or pair.cosine is None or pair.cosine > -ALIKE:
            continue
        a, b = whole.measures.models[i].norm, whole.measures.models[j].norm
        text = f"{models[i]} and {models[j]} will not merge: they undo each other; take one of them"
        reason = f"cosine {pair.cosine:.2f}, |A| = {a:.3g}, |B| = {b:.3g}"
        said.append(Suggestion("pair", text, reason, _MEASURED))
        out[j if b <= a else i] = None
    return tuple(place for place in range(len(models)) if place not in out), said


class _Parts:
    """The rules, over the models that are kept."""

    def __init__(
        self, models: Sequence[str], tensors: Sequence[AnalysedTensor], whole: AnalysedGroup, kept: Sequence[int]
    ) -> None:
        self.models, self.tensors, self.whole, self.kept = models, tensors, whole, kept
        pairs = pairs_of(len(models))
        self.pairs = [place for place, (i, j) in enumerate(pairs) if i in kept and j in kept]
        self.weight = _rounded(_equal_length(whole, kept))

    def method(self) -> tuple[str, Settings, list[Suggestion]]:
        """The method, its parameters, and why."""
        cosines, spectra = [self.whole.measures.pairs[pair].cosine or 0.0 for pair in self.pairs], self.whole.spectra
        if min(cosines) >= ALIKE:
            reason = f"the deltas point the same way: cosines from {min(cosines):.2f} to {max(cosines):.2f}"
            weight: Settings = {"weight": round(1 / len(self.kept), 4)}
            return "linear", weight, [Suggestion("method", "linear: average the models", reason, _SOUPS)]
        left, right = (mean(side[pair] for pair in self.pairs) for side in (spectra.left, spectra.right))
        if left is not None and right is not None and spectra.chance and min(left, right) >= SHARED * spectra.chance:
            reason = (
                f"leading singular directions of the models overlap by {left:.2f} (left) and {right:.2f} (right), "
                f"random ones by {spectra.chance:.2f}; tsv makes them orthogonal"
            )
            return "tsv", {"lambda": 1.0}, [Suggestion("method", "tsv", reason, _TSV)]
        return self._by_element(cosines)

    def _by_element(self, cosines: Sequence[float]) -> tuple[str, Settings, list[Suggestion]]:
        """TIES where the signs of large entries agree more than those of all, else task arithmetic."""
        kept = {
            density: min(self.whole.measures.models[place].energy[level] for place in self.kept)
            for level, density in enumerate(DENSITIES)
        }
        density = min(density for density, energy in kept.items() if energy >= ENERGY)
        apart = f"the deltas are nearly orthogonal (cosines up to {max(cosines):.2f})"
        whole, trimmed = self._conflict(0), self._conflict(DENSITIES.index(density))
        reason = f"signs conflict in {whole:.0%} of the entries, in {trimmed:.0%} of the largest {density:.0%}"
        if trimmed > CALMER * whole:
            why = Suggestion("method", "task_arithmetic", f"{apart}; {reason}", _ARITHMETIC)
            return "task_arithmetic", {"weight": self._layers() or self.weight}, [why]
        said = [
            Suggestion("method", "ties", reason, _TIES),
            Suggestion("density", f"density {density:g}", f"keeps {kept[density]:.0%} of |d|^2 in every model", _TIES),
        ]
        return "ties", {"weight": 1.0, "density": density}, said

    def _conflict(self, level: int) -> float:
        """Mean over the pairs"""
        found = [self.whole.measures.pairs[pair].conflict[level] or 0.0 for pair in self.pairs]
        return sum(found) / len(found)

    def weights(self) -> Iterator[Suggestion]:
        """For task arithmetic, whether it is the method or is tried beside it."""
        reason = f"the weighted sum of {len(self.kept)} deltas is then as long as one of them"
        yield Suggestion("weight", f"task_arithmetic with weight {self.weight:g}", reason, _MEASURED)
        if (gradient := self._layers()) is not None:
            text = f"or weight {list(gradient)}, from the first layer to the last"
            yield Suggestion("gradient", text, "the same, layer by layer", _MEASURED)
        norms = {self.models[place]: self.whole.measures.models[place].norm for place in self.kept}
        long, short = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        if norms[short] and norms[long] >= LONGER * norms[short]:
            text = f"{long} outweighs {short}: try a smaller weight for it"
            ratio = f"its delta is {norms[long] / norms[short]:.1f} times as long"
            source = "sources disagree: MetaGPT (arXiv:2406.11385) gives longer deltas more weight"
            yield Suggestion("weight", text, ratio, source)

    def dtype(self, method: str) -> tuple[str, list[Suggestion]]:
        """The base's dtype, or float32 where that would lose too much of a delta with the method's weight."""
        stored = [tensor.dtypes[0] for tensor in self.tensors if len(tensor.shape) > 1] or ["F32"]
        dtype = max(dict.fromkeys(stored), key=stored.count)
        found = {self.models[place]: self.whole.measures.models[place] for place in self.kept}
        lost = {name: one.lost_at_share if method == "linear" else one.lost for name, one in found.items()}
        name = max(lost, key=lost.__getitem__)
        if dtype != "BF16" or lost[name] < LOST:
            return dtype if dtype in ("BF16", "F16") else "F32", []
        at = f" with weight 1/{len(self.models)}" if method == "linear" else ""
        reason = f"{lost[name]:.0%} of {name}'s |d|{at} is below half a bfloat16 ulp of the base"
        return "F32", [Suggestion("dtype", "write float32", reason, _MEASURED)]

    def _layers(self) -> tuple[float, ...] | None:
        """Weights at KNOTS places from the first layer to the last; None where they hardly differ."""
        layers = sorted({tensor.layer for tensor in self.tensors if tensor.layer is not None})
        if len(layers) < 2:
            return None
        knots = min(KNOTS, len(layers))
        bands = [layers[len(layers) * k // knots : len(layers) * (k + 1) // knots] for k in range(knots)]
        groups = [group_of([t for t in self.tensors if t.layer in band], len(self.models)) for band in bands]
        weights = tuple(_rounded(_equal_length(group, self.kept)) for group in groups if group is not None)
        return weights if max(weights) >= VARIES * min(weights) else None


def _equal_length(group: AnalysedGroup, kept: Sequence[int]) -> float:
    """See Measures.equal_length, of the models that are kept; 1 / n where they cancel or are zero."""
    norms = [model.norm for model in group.measures.models]
    square = sum(norms[place] ** 2 for place in kept)
    whole = square
    for (i, j), pair in zip(pairs_of(len(norms)), group.measures.pairs, strict=True):
        if i in kept and j in kept:
            whole += 2 * (pair.cosine or 0.0) * norms[i] * norms[j]
    return math.sqrt(square / len(kept) / whole) if whole > 0 else 1 / len(kept)


def _rounded(weight: float) -> float:
    return round(min(weight, 1.0), 2)
