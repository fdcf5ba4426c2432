"""Describes an adapter: ranks, scalings, sizes, and the norm of each module's change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from merge.adapters.files import Adapter
from merge.checkpoint.reader import SourceReader
from merge.dtypes import DTYPES
from merge.plan import TensorRef


def look_into(adapter: Adapter) -> list[dict[str, Any]]:
    """{name, kind, rank, scaling, parameters, norm} of each part.

    norm: ‖scaling · B·A‖, whose row lengths DoRA replaces; None for what takes a tensor's place.
    """
    rows: list[dict[str, Any]] = []
    with SourceReader(adapter.files) as reader:
        for name, module in adapter.modules.items():
            parts = [part for part in (module.a, module.b, module.magnitude) if part is not None]
            # ‖B·A‖² = sum of (B^T B) ∘ (A A^T), without a matrix of the module's size
            a, b = _values(reader, module.a), _values(reader, module.b)
            with np.errstate(over="ignore", invalid="ignore"):  # NaN weights give NaN, which is shown
                square = float(np.sum((b.T @ b) * (a @ a.T)))
            kind = ("dora" if module.magnitude is not None else "lora") + (" embedding" if module.embedding else "")
            rows.append(
                _row(name, kind, parts, module.rank, module.scaling, abs(module.scaling) * max(0.0, square) ** 0.5)
            )
    for name, factors in adapter.parameters.items():
        rows.append(_row(name, "lora of a parameter", [factors.a, factors.b]))
    for name, other in adapter.others.items():
        rows.append(_row(name, adapter.kind.lower(), list(other.parts.values())))
    rows += [_row(name, "whole tensor", [ref]) for name, ref in adapter.saved.items()]
    rows += [_row(name, "rows of tokens", [tokens.rows]) for name, tokens in adapter.tokens.items()]
    return rows


def _row(
    name: str,
    kind: str,
    parts: list[TensorRef],
    rank: int | None = None,
    scaling: float | None = None,
    norm: float | None = None,
) -> dict[str, Any]:
    parameters = sum(part.size for part in parts)
    return {"name": name, "kind": kind, "rank": rank, "scaling": scaling, "parameters": parameters, "norm": norm}


def _values(reader: SourceReader, ref: TensorRef) -> npt.NDArray[np.float64]:
    if ref.dtype == "F64":
        raw = np.empty(ref.size, DTYPES[ref.dtype].numpy_name)
        reader.read_into(ref, 0, raw)
        return raw.reshape(ref.shape)
    values = np.empty(ref.size, np.float32)
    reader.read_values(ref, 0, values)
    with np.errstate(invalid="ignore"):
        return values.reshape(ref.shape).astype(np.float64)
