"""arcee_fusion's kernel: its polynomials against the definition, which uses the C library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_tensor import run_fused, run_reference, to_raw

from merge.kernels.functions import exp_down, expm1_near
from merge.kernels.fusion import _relative, _row_divergences
from merge.methods import get_method
from merge.methods.arcee_fusion import divergence


def test_polynomials_are_exact_to_rounding() -> None:
    for x in np.linspace(-30, 0, 1001):
        assert abs(exp_down(x) / np.exp(x) - 1) < 4e-16
    assert exp_down(-1e300) < 1e-300
    for x in np.linspace(-1 / 8, 1 / 8, 1000):
        assert abs(expm1_near(x) / np.expm1(x) - 1) < 1e-15
    for r in np.linspace(np.expm1(-1 / 8), np.expm1(1 / 8), 1000):
        exact = sum((-1) ** k * r**k / (k * (k - 1)) for k in range(2, 60))
        assert abs(_relative(r) / exact - 1) < 1e-15


@pytest.mark.parametrize("step", [1e-12, 1e-6, 1e-3, 0.015, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("spread", [0.02, 1.0, 30.0])
def test_divergences_of_rows_are_those_of_the_definition(step: float, spread: float) -> None:
    """On either side of the change up to which the polynomials are used, about 1/16 here"""
    random = np.random.default_rng(0)
    base = random.standard_normal((5, 333)) * spread
    raw = np.stack([base, base + random.standard_normal((5, 333)) * step]).astype(np.float32)
    got = np.empty(5)
    _row_divergences(raw.reshape(2, -1), 333, got)
    wide = torch.from_numpy(raw).double()
    np.testing.assert_allclose(got, divergence(wide[1], wide[0]).squeeze(-1), rtol=1e-10, atol=1e-30)


def test_rows_that_are_not_finite_are_left_to_the_definition() -> None:
    random = np.random.default_rng(1)
    raw = np.repeat(random.standard_normal((1, 6, 40)).astype(np.float32), 2, 0)
    raw[1] += random.standard_normal((6, 40)).astype(np.float32) * np.float32(1e-3)
    for row, (source, value) in enumerate([(0, np.nan), (1, np.nan), (0, np.inf), (1, np.inf), (1, -np.inf)]):
        raw[source, row, 7] = value
    got = np.empty(6)
    _row_divergences(raw.reshape(2, -1), 40, got)
    wide = torch.from_numpy(raw).double()
    np.testing.assert_allclose(got, divergence(wide[1], wide[0]).squeeze(-1), rtol=1e-10)


@pytest.mark.parametrize("shape", [(40, 64), (2560,), (1, 2560), (1280, 2), (2, 20, 64)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_kernel_takes_what_the_definition_takes(dtype: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(2)
    base = random.standard_normal(2560) * 0.02
    raw = to_raw(np.stack([base, base + random.standard_normal(2560) * 1e-3]), dtype)
    method = get_method("arcee_fusion")
    assert method is not None
    wanted = run_reference(method, raw, shape)
    for chunk, per_block in [(64, 1), (64, 3), (1000, 1), (1 << 17, 1)]:
        np.testing.assert_array_equal(run_fused(method, raw, chunk, per_block, shape), wanted)
