"""Parameters that several methods share, each declared once: its type, its range, its line in the documents."""

from __future__ import annotations

from typing import Annotated, Literal

from merge.methods.registry import PerModel, Range

Lambda = Annotated[float, "factor of the merged task vector"]
Normalize = Annotated[bool, "divide by the sum of the weights"]
NormalizeAgreeing = Annotated[bool, "divide by the sum of the weights that agree"]
Weight = Annotated[PerModel[float], "weight of the task vector"]
Factor = Annotated[PerModel[float], "factor of the task vector"]
AdapterFactor = Annotated[PerModel[float], "factor of the adapter's change; negative subtracts it"]
MergeFunc = Annotated[Literal["normalize", "mean", "sum"], "mean or sum, overriding `normalize`"]
DivideBy = Annotated[Literal["weights", "count"], "mean by weights, or by entries that agree"]
Consensus = Annotated[Literal["sum", "count"], "sign of the weighted sum, or of most entries"]
RescaleRanked = Annotated[Literal[True, False, "l1"], "true: times 1/p of each entry; l1: to the old L1 norm"]
RescaleDropped = Annotated[Literal[True, False, "l1"], "true: times 1/density; l1: to the old L1 norm"]
Gamma = Annotated[PerModel[float], Range(0.0, 1.0), "share of entries dropped, the largest"]
Epsilon = Annotated[PerModel[float], Range(0.0, 1.0), "spread of that probability to either side"]
KeptShare = Annotated[PerModel[float], Range(0.0, 1.0), "share of entries kept"]
MeanKeptProbability = Annotated[PerModel[float], Range(0.0, 1.0), "probability that an entry is kept, on average"]
KeptProbability = Annotated[PerModel[float], Range(0.0, 1.0), "probability that an entry is kept"]
