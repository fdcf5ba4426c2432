"""Rounding into the output dtype: what torch's conversions give, overflow counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merge.dtypes import DTYPES
from merge.kernels.encode import encode

SMALL = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]


def as_stored(values: npt.NDArray[Any], dtype: str) -> tuple[npt.NDArray[Any], tuple[int, int, float, float]]:
    out = np.empty(values.size, DTYPES[dtype].numpy_name)
    counts = encode(values, dtype, out)
    return out.view(f"u{out.itemsize}"), counts


def by_torch(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    kind = getattr(torch, DTYPES[dtype].torch_name)
    return torch.from_numpy(values).to(kind).view(torch.uint16 if kind.itemsize == 2 else torch.uint8).numpy()


def every_value(dtype: str) -> npt.NDArray[np.float32]:
    """All finite values of a format, as float32"""
    width = DTYPES[dtype].itemsize
    codes = torch.from_numpy(np.arange(1 << (8 * width), dtype=f"u{width}"))
    values = codes.view(getattr(torch, DTYPES[dtype].torch_name)).float().numpy()
    return np.sort(values[np.isfinite(values)])


@pytest.mark.parametrize("dtype", SMALL)
def test_values_halfway_points_and_their_neighbours_round_to_nearest_even(dtype: str) -> None:
    exact = every_value(dtype)
    halfway = (exact[1:] / 2 + exact[:-1] / 2).astype(np.float32)
    up, down = (np.nextafter(halfway, np.float32(side)) for side in (np.inf, -np.inf))
    values = np.concatenate([exact, halfway, up, down])
    values = values[np.abs(values) <= exact.max()]
    stored, (nonfinite, overflow, largest, _) = as_stored(values, dtype)
    np.testing.assert_array_equal(stored, by_torch(values, dtype))
    assert (nonfinite, overflow, largest) == (0, 0, exact.max())


@pytest.mark.parametrize("dtype", SMALL)
def test_any_float32_within_range_rounds_to_nearest_even(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(200_000) * np.exp2(random.integers(-40, 20, 200_000).astype(np.float64))
    values = values.astype(np.float32)
    values = values[np.abs(values) <= every_value(dtype).max()]
    np.testing.assert_array_equal(as_stored(values, dtype)[0], by_torch(values, dtype))


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large", "code"),
    [
        ("F16", 65519.0, 65520.0, 0x7C00),
        ("F8_E4M3", 464.0, 465.0, 0x7F),
        ("F8_E5M2", 61439.0, 61440.0, 0x7C),
        ("BF16", 3.3895e38, 3.4e38, 0x7F80),
    ],
)
def test_overflow_is_counted_and_becomes_infinite(dtype: str, fits: float, too_large: float, code: int) -> None:
    values = np.array([fits, -fits, too_large, -too_large], np.float32)
    stored, (nonfinite, overflow, _, _) = as_stored(values, dtype)
    sign = 1 << (8 * stored.itemsize - 1)
    assert (nonfinite, overflow) == (0, 2)
    assert stored.tolist()[2:] == [code, code | sign]
    assert stored[0] == stored[1] & ~np.array(sign, stored.dtype)
    assert stored[0] < code


@pytest.mark.parametrize("dtype", [*SMALL, "F32"])
def test_numbers_that_are_not_finite_are_counted_and_stay_so(dtype: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0, -0.0], np.float32)
    stored, (nonfinite, overflow, largest, squares) = as_stored(values, dtype)
    kind = getattr(torch, DTYPES[dtype].torch_name)
    back = torch.from_numpy(stored.copy()).view(kind).float().numpy()
    assert (nonfinite, overflow, largest) == (3, 0, 1.0)
    assert not np.isfinite(squares)
    assert np.isnan(back[0])
    assert not np.isfinite(back[1:3]).any()
    assert back[3] == 1.0
    assert np.signbit(back[4])
