"""Loops over elements run in vector registers, also where the processor has AVX2 and no more, as most laptops'.

And what was written for that in place of a division and of a function of the C library gives the same numbers.
"""

from __future__ import annotations

import math
import platform
import runpy
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from machine_code import loops_of
from numba import njit

from merge.kernels.bits import frexp, quotient, where

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "kernels.py"
# Loops that are not over elements, or cannot do several at once: how many of each kernel, and why.
SCALAR: dict[str, tuple[int, str]] = {
    "deltas._sums": (1, "the largest of 64 lanes"),
    "difference._pair": (1, "the largest of 64 lanes"),
    "difference._tasks": (1, "the largest of 64 lanes"),
    "fold.scale_rows": (1, "a sum in one order"),
    "fusion._row_divergences": (3, "the largest of 64 lanes, and sums in one order"),
    "ranks._repair": (1, "the few entries that are out of order"),
    "rotate.reflect": (1, "a sum in one order"),
    "rounding._sums": (1, "the largest of 64 lanes"),
    "selection._bucket_from_top": (1, "ends at what is looked for"),
    "selection._coarse_histogram": (1, "counts by value, of a sample"),
    "selection._place_of_equal": (1, "ends at what is looked for"),
    "selection._window_histogram": (3, "counts by value, of the few in the window"),
    "sparsify._mark_ranked": (1, "stores from order of rank to order of place"),
    "spherical._ratio": (1, "over models"),
    "spherical._stock_rows": (1, "over models"),
}


ONLY_X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not llvm.get_host_cpu_features().get("avx2"),
    reason="runs code for AVX2, which this processor does not have",
)


def scalar_loops(*names: str) -> dict[str, int]:
    """Kernels that have more scalar loops than they may, of those that these methods and modules (or all) use."""
    rows = runpy.run_path(str(BENCHMARK))["rows_on"]("avx2", names, timed=False)
    assert rows
    excess = {row["kernel"]: len(row["scalar"]) - SCALAR.get(row["kernel"], (0, ""))[0] for row in rows}
    return {name: count for name, count in excess.items() if count > 0}


@ONLY_X86
def test_loops_of_the_commonest_kernels_are_in_vector_registers_under_avx2() -> None:
    assert scalar_loops("dare_ties", "linear") == {}


@ONLY_X86
@pytest.mark.full
def test_all_loops_are_in_vector_registers_under_avx2() -> None:
    """The benchmark fails if it leaves a kernel out."""
    assert scalar_loops() == {}


def test_a_loop_that_waits_for_itself_is_seen_to_be_scalar() -> None:
    values, out = np.ones(64, np.float32), np.empty(64, np.float32)
    _independent(values, out)
    _dependent(values, out)
    assert {loop.packed for loop in loops_of(_independent, _independent.signatures[0])} == {True}
    assert {loop.packed for loop in loops_of(_dependent, _dependent.signatures[0])} == {False}


@njit  # type: ignore[untyped-decorator]
def _independent(values: Any, out: Any) -> None:
    for i in range(len(values)):
        out[i] = where(values[i] > 0, values[i], np.float32(1))


@njit  # type: ignore[untyped-decorator]
def _dependent(values: Any, out: Any) -> None:
    total = np.float32(0)
    for i in range(len(values)):
        total = total * np.float32(0.5) + values[i]
        out[i] = total


@pytest.mark.parametrize("divisor", [2, 3, 5, 7, 49, 127, 255, 499, 500])
def test_quotients_are_those_of_a_division(divisor: int) -> None:
    random = np.random.default_rng(divisor)
    numbers = random.standard_normal(20_000) * 2.0 ** random.integers(-280, 250, 20_000)
    near_whole = random.integers(1, 1 << 40, 20_000) * float(divisor) + random.integers(-1, 2, 20_000)
    for values in (numbers, near_whole, np.array([0.0, 5e-90, 1e300])):
        np.testing.assert_array_equal(_divided(values, float(divisor)), values / divisor)


@njit  # type: ignore[untyped-decorator]
def _divided(values: Any, divisor: float) -> Any:
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = quotient(values[i], divisor, 1.0 / divisor)
    return out


def test_mantissas_and_exponents_are_those_of_the_c_library() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 64, 5000, dtype=np.uint64)
    special = [0.0, -0.0, 1.0, -0.5, 5e-324, -5e-324, 2.0**-1022, 2.0**-1023, np.inf, -np.inf, np.nan]
    for value in [*bits.view(np.float64), *(bits >> np.uint64(12)).view(np.float64), *special]:
        assert str(_split(value)) == str(tuple(map(float, math.frexp(value))))


@njit  # type: ignore[untyped-decorator]
def _split(value: float) -> Any:
    return frexp(value)
