"""The result of `merge analyse`: frozen data by tensor, with sums by role and layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from merge.architecture.tensor_kinds import ROLES
from merge.tools.analyse.elements import DeltaSums, Measures, pairs_of
from merge.tools.analyse.spectra import RANKS, MatrixSpectra


@dataclass(frozen=True)
class AnalysisFinding:
    """Something to know before merging.

    Attributes:
        level: "problem": the merge fails or is worthless; "warning": look at it; "note": a difference without harm.
        models: whom it is about, by name.
    """

    level: Literal["problem", "warning", "note"]
    what: str
    models: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class AnalysedTensor:
    """One tensor that the base and all models have, in one shape.

    Attributes:
        layer: its number in the main stack; None outside.
        dtypes: of base and models, as stored.
        spectra: of the matrices that were looked at.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    sums: DeltaSums
    spectra: MatrixSpectra | None

    @property
    def measures(self) -> Measures:
        return self.sums.measures()


@dataclass(frozen=True)
class SpectraMeans:
    """Means over matrices; None where none was looked at. By model, or by pair of models.

    Attributes:
        matrices: how many.
        energy: of each model, by RANKS.
    """

    matrices: int
    effective_rank: tuple[float | None, ...]
    stable_rank: tuple[float | None, ...]
    energy: tuple[tuple[float, ...] | None, ...]
    left: tuple[float | None, ...]
    right: tuple[float | None, ...]
    chance: float | None
    interference: float | None
    pair_interference: tuple[float | None, ...]

    @staticmethod
    def of(found: Sequence[MatrixSpectra], n: int) -> SpectraMeans:
        pairs = range(len(pairs_of(n)))
        models = [[one for each in found if (one := each.models[m]) is not None] for m in range(n)]
        return SpectraMeans(
            matrices=len(found),
            effective_rank=tuple(mean(one.effective_rank for one in each) for each in models),
            stable_rank=tuple(mean(one.stable_rank for one in each) for each in models),
            energy=tuple(_curve([one.energy for one in each]) for each in models),
            left=tuple(mean(each.left[pair] for each in found) for pair in pairs),
            right=tuple(mean(each.right[pair] for each in found) for pair in pairs),
            chance=mean(each.chance for each in found),
            interference=mean(each.interference for each in found),
            pair_interference=tuple(mean(each.pair_interference[pair] for each in found) for pair in pairs),
        )


@dataclass(frozen=True)
class AnalysedGroup:
    """Tensors of a role, of a layer, of both, or all; `role` or `layer` None: of any."""

    role: str | None
    layer: int | None
    tensors: int
    measures: Measures
    spectra: SpectraMeans


@dataclass(frozen=True)
class DeltaLook:
    """What a model's delta looks like.

    Attributes:
        kind: "none", "lora", "embeddings", "norms" or "full".
        text: a sentence.
        rank: of a LoRA.
        roles: those that changed; layers: those that changed, n_layers of them in all.
        modules: last parts of the changed modules' names, which are LoRA's target_modules; whole: of those that changed
            and are no matrices of low rank (modules_to_save).
    """

    kind: Literal["none", "lora", "embeddings", "norms", "full"]
    text: str
    rank: int | None
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    modules: tuple[str, ...]
    whole: tuple[str, ...]


@dataclass(frozen=True)
class Suggestion:
    """One piece of advice.

    Attributes:
        about: "method", "weight", "gradient", "density", "pair", "model", "dtype" or "tokenizer".
        text: what to do; reason: what was measured; source: who found that it helps.
    """

    about: str
    text: str
    reason: str
    source: str


@dataclass(frozen=True)
class Analysis:
    """What `merge analyse` finds.

    Attributes:
        base, models: as they were named.
        pairs: of models, as indices, in the order of all lists of pairs.
        densities, ranks: of measures by density, and of energy curves.
        left_out: tensors that were not measured, and why.
        looks: of each model.
        recipe: the suggestion as YAML; None if there is nothing to merge.
    """

    base: str
    models: tuple[str, ...]
    densities: tuple[float, ...]
    tensors: tuple[AnalysedTensor, ...]
    left_out: tuple[tuple[str, str], ...]
    findings: tuple[AnalysisFinding, ...]
    looks: tuple[DeltaLook, ...]
    suggestions: tuple[Suggestion, ...]
    recipe: str | None
    notes: tuple[str, ...]
    ranks: tuple[int, ...] = RANKS

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return pairs_of(len(self.models))

    @property
    def roles(self) -> list[str]:
        """Those that the tensors have, in the order of ROLES."""
        found = {tensor.role for tensor in self.tensors}
        return [role for role in ROLES if role in found]

    @property
    def layers(self) -> list[int]:
        return sorted({tensor.layer for tensor in self.tensors if tensor.layer is not None})

    def group(self, role: str | None = None, layer: int | None = None) -> AnalysedGroup | None:
        """The tensors of a role, of a layer, of both, or all; None if there are none."""
        return group_of(self.tensors, len(self.models), role, layer)

    def cell(self, role: str, layer: int | None) -> AnalysedGroup | None:
        """The tensors of a role in a layer; None: outside the layers."""
        chosen = [tensor for tensor in self.tensors if tensor.layer == layer]
        return group_of(chosen, len(self.models), role)


def group_of(
    tensors: Iterable[AnalysedTensor], n: int, role: str | None = None, layer: int | None = None
) -> AnalysedGroup | None:
    """See Analysis.group; `n`: how many models."""
    chosen = [
        tensor
        for tensor in tensors
        if (role is None or tensor.role == role) and (layer is None or tensor.layer == layer)
    ]
    if not chosen:
        return None
    spectra = [tensor.spectra for tensor in chosen if tensor.spectra is not None]
    measures = DeltaSums.total([tensor.sums for tensor in chosen]).measures()
    return AnalysedGroup(role, layer, len(chosen), measures, SpectraMeans.of(spectra, n))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _curve(curves: Sequence[tuple[float, ...]]) -> tuple[float, ...] | None:
    return tuple(sum(column) / len(curves) for column in zip(*curves, strict=True)) if curves else None
