"""The analysis as plain data for JSON, as rows for CSV, and the map of models."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from merge.tools.analyse.elements import Measures
from merge.tools.analyse.results import AnalysedGroup, Analysis
from merge.tools.analyse.spectra import MatrixSpectra

_COLUMNS = ("tensor", "role", "layer", "measure", "at", "a", "b", "value")
_OF_SPECTRA = ("left", "right", "pair_interference")


def as_data(analysis: Analysis) -> dict[str, Any]:
    """Everything, for JSON: `all`, by role, by layer, by both (`cells`), and tensor by tensor."""
    cells = [(role, layer) for role in analysis.roles for layer in analysis.layers]
    return {
        "base": analysis.base,
        "models": list(analysis.models),
        "pairs": [[analysis.models[i], analysis.models[j]] for i, j in analysis.pairs],
        "densities": list(analysis.densities),
        "ranks": list(analysis.ranks),
        "findings": [dataclasses.asdict(finding) for finding in analysis.findings],
        "looks": [dataclasses.asdict(look) for look in analysis.looks],
        "suggestions": [dataclasses.asdict(suggestion) for suggestion in analysis.suggestions],
        "recipe": analysis.recipe,
        "left_out": [{"tensor": name, "reason": reason} for name, reason in analysis.left_out],
        "all": _group(analysis.group()),
        "roles": [_group(analysis.group(role)) for role in analysis.roles],
        "layers": [_group(analysis.group(layer=layer)) for layer in analysis.layers],
        "cells": [_group(found) for role, layer in cells if (found := analysis.group(role, layer)) is not None],
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "layer": tensor.layer,
                "shape": list(tensor.shape),
                "dtypes": list(tensor.dtypes),
                **dataclasses.asdict(tensor.measures),
                "spectra": None if tensor.spectra is None else dataclasses.asdict(tensor.spectra),
            }
            for tensor in analysis.tensors
        ],
    }


def _group(group: AnalysedGroup | None) -> dict[str, Any] | None:
    if group is None:
        return None
    found = dataclasses.asdict(group)
    measures: dict[str, Any] = found.pop("measures")
    return found | measures


def as_csv(analysis: Analysis) -> str:
    """One measure of one tensor in each row. `at`: a density or a rank; `a`, `b`: the models it is of."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for tensor in analysis.tensors:
        head = (tensor.name, tensor.role, "" if tensor.layer is None else tensor.layer)
        writer.writerows((*head, *row) for row in _measures(analysis, tensor.measures))
        if tensor.spectra is not None:
            writer.writerows((*head, *row) for row in _spectra(analysis, tensor.spectra))
    return out.getvalue()


Row = tuple[str, object, str, str, object]


def _measures(analysis: Analysis, measures: Measures) -> Iterator[Row]:
    yield "size", "", "", "", measures.size
    yield from _values("", "", {"cancelled": measures.cancelled, "equal_length": measures.equal_length}, analysis)
    for name, model in zip(analysis.models, measures.models, strict=True):
        yield from _values(name, "", dataclasses.asdict(model), analysis)
    for (i, j), pair in zip(analysis.pairs, measures.pairs, strict=True):
        yield from _values(analysis.models[i], analysis.models[j], dataclasses.asdict(pair), analysis)


def _spectra(analysis: Analysis, spectra: MatrixSpectra) -> Iterator[Row]:
    yield from _values("", "", {"chance": spectra.chance, "interference": spectra.interference}, analysis)
    for name, model in zip(analysis.models, spectra.models, strict=True):
        if model is not None:
            values = dataclasses.asdict(model)
            energies = values.pop("energy")
            yield from _values(name, "", values, analysis)
            yield from (("energy_of_rank", r, name, "", e) for r, e in zip(analysis.ranks, energies, strict=True))
    for place, (i, j) in enumerate(analysis.pairs):
        values = {key: getattr(spectra, key)[place] for key in _OF_SPECTRA}
        yield from _values(analysis.models[i], analysis.models[j], values, analysis)


def _values(a: str, b: str, values: dict[str, Any], analysis: Analysis) -> Iterator[Row]:
    for key, value in values.items():
        if isinstance(value, tuple):
            yield from ((key, at, a, b, _said(each)) for at, each in zip(analysis.densities, value, strict=True))
        else:
            yield key, "", a, b, _said(value)


def _said(value: object) -> object:
    return "" if value is None else value


def positions(analysis: Analysis) -> list[tuple[float, float]]:
    """(x, y) of each model in a plane, by classical scaling of the distances sqrt(2 - 2 cos) of their deltas.

    These are the distances of the deltas scaled to length 1. Source: Torgerson 1952, "Multidimensional scaling".
    """
    n = len(analysis.models)
    whole = analysis.group()
    gram = np.eye(n)
    if whole is not None:
        for (i, j), pair in zip(analysis.pairs, whole.measures.pairs, strict=True):
            gram[i, j] = gram[j, i] = pair.cosine or 0.0
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(centre @ gram @ centre)
    axes = np.zeros((n, 2))
    for axis in range(min(2, n)):
        vector = vectors[:, -1 - axis]
        vector = vector * (1 if vector[np.argmax(np.abs(vector))] > 0 else -1)
        axes[:, axis] = vector * np.sqrt(max(0.0, values[-1 - axis]))
    return [(float(x), float(y)) for x, y in axes]
