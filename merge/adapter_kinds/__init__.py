"""PEFT adapters other than LoRA: one file for each kind that can be folded exactly.

Adding a file adds a kind; the first line of its docstring has the kind's name and formula. A kind changes runs of rows
of a module's matrix, (out, in), in float64. What it needs for the whole matrix is computed once, when the tensor is
first read (merge/sources/adapted.py).

The formulas are those of each kind's get_delta_weight and merge in peft 0.21.2, tuners/KIND/layer.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.arrays import F64
from merge.quoting import quoted

Shape = tuple[int, ...]
Settings = dict[str, Any]
Parts = Mapping[str, F64]
# rows(first, values): rows first .. first + n of the matrix, (n, in) float64, as they are -> as the adapter has them
Rows = Callable[[int, F64], None]

# PEFT's name of a kind, which is its file's name in capitals -> the module
KINDS: dict[str, str] = {
    file.name.upper(): f"{__name__}.{file.name}" for file in pkgutil.iter_modules(__path__) if file.name != "patterns"
}


@dataclass(frozen=True)
class AdaptedModule:
    """One module's part of an adapter.

    Attributes:
        name: of the module, as PEFT names it.
        shapes: of its tensors, by what stands behind the module's name, with those that all modules share.
        config: adapter_config.json.
    """

    name: str
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        parts: names of the tensors that a module may have.
        shared: names of tensors that all modules share.
        settings: (module, (out, in)) -> plain numbers that `rows` needs. "unit": rows change in whole runs of so many;
            "bias": the bias changes as a column of the matrix would. Raises ValueError with the short cause.
        rows: (tensors, settings, (out, in)) -> the change.
        bitwise: whether the change has the same bytes on every machine; not where BLAS or numpy's functions are used.
        held: (settings, (out, in)) -> bytes that `rows` keeps besides twice the tensors as float64.
    """

    parts: tuple[str, ...]
    settings: Callable[[AdaptedModule, Shape], Settings]
    rows: Callable[[Parts, Settings, Shape], Rows]
    shared: tuple[str, ...] = ()
    held: Callable[[Settings, Shape], int] = lambda settings, matrix: 0
    bitwise: bool = True


def find_kind(name: str) -> Kind:
    kind: Kind = importlib.import_module(KINDS[name]).KIND
    return kind


def expect(module: AdaptedModule, shapes: Mapping[str, Shape | None]) -> None:
    """Holds a module to its tensors; None where none may be.

    Raises:
        ValueError: naming the first that is missing, too many or of another shape.
    """
    for part, wanted in shapes.items():
        found = module.shapes.get(part)
        if found != wanted:
            said = {True: "none", False: f"{list(wanted or ())}"}[wanted is None]
            raise ValueError(f"{part}: expected {said}, found {'none' if found is None else list(found)}")


def number(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A setting that must be a number; a missing one has PEFT's default."""
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"{key}: expected a number in adapter_config.json, found {quoted(value, 40)}")
    return value


def product(left: F64, right: F64) -> F64:
    """left (rows, k) · right (k, columns), each number summed in one order, whichever rows are requested"""
    from merge.kernels.fold import accumulate

    out = np.zeros((left.shape[0], right.shape[1]))
    accumulate(np.ascontiguousarray(left), np.ascontiguousarray(right), 1.0, out)
    return out
