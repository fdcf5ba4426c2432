"""Quicker ways of methods that decompose matrices: float32 for results of 16 bits, and low ranks in few dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_methods_matrix import NAMES, close, merge, nearest_orthogonal, random_deltas
from torch import Tensor

from merge import build_plan, parse_recipe, run_plan
from merge.kernels import spectral, spectral_float32, spectral_low_rank
from merge.kernels.spectral_float32 import Inexact
from merge.kernels.spectral_low_rank import low_rank_svd
from merge.one_thread import ONE_THREAD

SHAPES = [(160, 160), (240, 160), (160, 240)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices of the sizes here count as large, and one thread does them, as in the engine."""
    monkeypatch.setattr(spectral, "FLOAT32_FROM", 100)
    monkeypatch.setattr(spectral_float32, "_WINDOW", 16)
    monkeypatch.setattr(spectral_float32, "_FEW", 8)
    with ONE_THREAD:
        yield


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that float64 took over from float32."""
    taken: list[bool] = []
    whole = spectral._of_one

    def count(deltas: Tensor, weight: tuple[float, ...], function: Callable[..., Tensor], float32: bool) -> Tensor:
        def seen(matrices: list[Tensor]) -> Tensor:
            given.append(matrices[0].dtype)
            return function(matrices)

        given: list[torch.dtype] = []
        merged = whole(deltas, weight, seen, float32)
        taken.extend([True] * (len(given) - 1))
        assert float32 or given == [torch.float64]
        return merged

    monkeypatch.setattr(spectral, "_of_one", count)
    return taken


def spectrum(kind: str, shape: tuple[int, int], n: int = 3) -> Tensor:
    """Random singular vectors, and strengths that are even, fall, or are led by strong ones, or by an adapter's

    With seed 2 strengths at the limits of tsv and iso_cts are apart; which of two equal ones is kept, rounding decides.
    """
    deltas = random_deltas(n, shape, seed=2).double()
    u, s, vt = torch.linalg.svd(deltas, full_matrices=False)
    side = s.shape[1]
    if kind == "spiked":
        s[:, :6] *= torch.logspace(1.2, 0.1, 6, dtype=torch.float64)
    if kind == "adapter":
        s[:, :2] *= 100
    if kind == "falling":
        s *= torch.linspace(1.0, 0.3, side, dtype=torch.float64) ** 2
    return ((u * s[:, None]) @ vt).float()


def steps_apart(got: Tensor, wanted: Tensor) -> Tensor:
    """Steps of bfloat16 between values of the same sign or near zero"""
    bits = [values.to(torch.bfloat16).view(torch.int16).to(torch.int32) for values in (got, wanted)]
    places = [torch.where(each < 0, -(each & 0x7FFF), each) for each in bits]
    return (places[0] - places[1]).abs()


@pytest.mark.parametrize("kind", ["even", "spiked", "falling", "adapter"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_the_definition_but_for_one_step_of_bfloat16(
    name: str, shape: tuple[int, int], kind: str, refused: list[bool]
) -> None:
    deltas = spectrum(kind, shape)
    wanted, got = merge(name, deltas), merge(name, deltas, _float32=True)
    assert torch.equal(got, wanted) == bool(refused)
    assert not refused or (name == "wudi" and kind in ("spiked", "adapter"))
    close(got, wanted, 1e-4)
    base = random_deltas(1, shape, seed=1)[0].double()
    base *= 20 * torch.linalg.vector_norm(wanted) / torch.linalg.vector_norm(base)
    assert (steps_apart(base + got, base + wanted) > 1).double().mean() < 1e-3


def test_weights_density_and_other_parameters_are_the_same_in_float32() -> None:
    deltas, weight = spectrum("even", (160, 200)), (1.0, 0.5, 0.3)
    for name, parameters in {
        "tsv": {"density": 0.5},
        "iso_c": {"lambda_": -0.5},
        "iso_cts": {"common": 0.5},
        "wudi": {"ridge": 0.5},
    }.items():
        given: dict[str, Any] = {"weight": weight, **parameters}
        close(merge(name, deltas, _float32=True, **given), merge(name, deltas, **given), 1e-4)


def test_a_density_of_zero_keeps_nothing() -> None:
    assert merge("tsv", spectrum("even", (160, 160)), density=0.0, _float32=True).abs().max() == 0


def test_one_task_is_that_model_in_float32() -> None:
    deltas = spectrum("even", (160, 160), 1)
    close(merge("tsv", deltas, _float32=True), deltas[0].double(), 1e-5)
    close(merge("wudi", deltas, _float32=True), deltas[0].double(), 1e-5)


def orthogonal(shape: tuple[int, int]) -> Tensor:
    return torch.stack([nearest_orthogonal(each.double()).float() for each in random_deltas(3, shape)])


def missing_rank() -> Tensor:
    return spectrum("even", (160, 160)) @ torch.diag((torch.arange(160) < 140).float())


def nearly_missing_rank() -> Tensor:
    return spectrum("even", (160, 160)) @ torch.diag(torch.where(torch.arange(160) < 140, 1.0, 1e-6))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [missing_rank, nearly_missing_rank])
def test_missing_ranks(name: str, make: Callable[[], Tensor]) -> None:
    deltas = make()
    close(merge(name, deltas, _float32=True), merge(name, deltas), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_model_and_zero_task_vectors(name: str) -> None:
    deltas = spectrum("even", (160, 160))
    copies = deltas[:1].expand(3, -1, -1)
    close(merge(name, copies, _float32=True), merge(name, copies), 1e-4)
    deltas[1] = 0
    close(merge(name, deltas, _float32=True), merge(name, deltas), 1e-4)
    assert merge(name, deltas * 0, _float32=True).abs().max() == 0


def test_equal_singular_values() -> None:
    """Which of them are the strongest is open, so only what needs all of them has one result."""
    deltas = orthogonal((160, 160))
    close(merge("iso_c", deltas[:1], _float32=True), deltas[0].double(), 1e-5)
    close(merge("wudi", deltas, _float32=True), merge("wudi", deltas), 1e-5)
    for name in ("tsv", "iso_cts"):
        assert merge(name, deltas, _float32=True).isfinite().all()
    got = torch.linalg.svdvals(merge("tsv", deltas, _float32=True))
    np.testing.assert_allclose(got, torch.linalg.svdvals(merge("tsv", deltas)), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_float32_cannot_square(name: str, scale: float) -> None:
    deltas = spectrum("even", (120, 120))
    wanted = merge(name, deltas)
    close(merge(name, (deltas * scale).float(), _float32=True) / scale, wanted, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_spoil_their_matrix_only(name: str) -> None:
    deltas = spectrum("even", (120, 120), 4).reshape(2, 2, 120, 120)
    wanted = merge(name, deltas[:, 1], _float32=True)
    for value in (torch.nan, torch.inf):
        deltas[1, 0, 2, 2] = value
        got = merge(name, deltas, _float32=True)
        assert got[0].isnan().all()
        assert torch.equal(got[1], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_float64_models_and_small_matrices_stay_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = spectrum("even", (120, 120))
    assert torch.equal(merge(name, deltas.double(), _float32=True), merge(name, deltas.double()))
    monkeypatch.setattr(spectral, "FLOAT32_FROM", 121)
    assert torch.equal(merge(name, deltas, _float32=True), merge(name, deltas))


def test_float32_refuses_what_it_cannot_do() -> None:
    for matrix in (spectrum("even", (160, 160))[0] * 1e20, torch.ones(160, 160)):
        with pytest.raises(Inexact):
            spectral_float32.polar(matrix)
    u, s, v = spectral_float32.thin_svd(torch.zeros(20, 10))
    assert (u.shape, s.shape, v.shape) == ((20, 0), (0,), (10, 0))


@pytest.mark.parametrize("rank", [None, 1, 50, 100, 159, 160, 999])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thin_svd_in_float32(shape: tuple[int, int], rank: int | None) -> None:
    matrix = spectrum("spiked", shape, 1)[0]
    u, s, v = spectral_float32.thin_svd(matrix, rank)
    wanted = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = min(rank or 160, 160)
    np.testing.assert_allclose(s, wanted.S[:count], rtol=1e-3, atol=1e-6 * float(wanted.S[0]))
    for side in (u, v):
        assert side.shape[1] == count
        np.testing.assert_allclose(side.T @ side, np.eye(count), atol=2e-5)
    close((u * s) @ v.T, (wanted.U[:, :count] * wanted.S[:count]) @ wanted.Vh[:count], 1e-4)


@pytest.mark.parametrize(("dtype", "float32"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_results_of_16_bits_are_computed_in_float32_to_the_same_bytes_on_any_threads(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str, float32: bool
) -> None:
    make_model(tmp_path / "base", hidden=128, dtype="BF16")
    for seed, name in enumerate("ab", 1):
        make_model(tmp_path / name, hidden=128, dtype="BF16", base=tmp_path / "base", delta=0.002, seed=seed)
    asked, whole = set(), spectral._of_one

    def seen(*given: Any) -> Tensor:
        asked.add(given[-1])
        return whole(*given)

    monkeypatch.setattr(spectral, "_of_one", seen)
    models = f"[{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]"
    for name in ("tsv", "wudi"):
        plan = build_plan(
            parse_recipe(f"merge_method: {name}\nbase_model: {tmp_path}/base\nmodels: {models}\ndtype: {dtype}\n")
        )
        written = []
        for threads in (1, 2):
            out = tmp_path / f"{name}-{threads}"
            run_plan(plan, out, threads=threads)
            written.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
        assert written[0] == written[1]
        assert written[0]
    assert asked == {float32}


# Low rank.


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_low_rank, "_LEAST", 100)
    monkeypatch.setattr(spectral_low_rank, "_SHARES", (20, 3))


def folded(shape: tuple[int, int], rank: int) -> Tensor:
    """Changes of low rank, as subtracting the base from what they were added to leaves them"""
    base = random_deltas(1, shape, seed=9)[0] * 20
    return (base + random_deltas(3, shape, rank)) - base


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("make", [random_deltas, folded])
@pytest.mark.parametrize("name", NAMES)
def test_low_ranks_give_what_whole_matrices_do(
    name: str, make: Callable[..., Tensor], float32: bool, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SHAPES:
        deltas = random_deltas(3, shape, 4) if make is random_deltas else folded(shape, 4)
        with monkeypatch.context() as patch:
            for decomposition in ("eigh", "cholesky"):
                patch.setattr(torch.linalg, decomposition, small_only(getattr(torch.linalg, decomposition)))
            got = merge(name, deltas, _float32=float32)
        with monkeypatch.context() as patch:
            patch.setattr(spectral_low_rank, "_LEAST", 999)
            close(got, merge(name, deltas), 1e-8)


def small_only(decomposition: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def checked(matrix: Tensor) -> Any:
        assert len(matrix) <= 3 * 4
        assert matrix.dtype == torch.float64
        return decomposition(matrix)

    return checked


def test_a_decomposition_of_low_rank_is_that_of_the_matrix(narrow: None) -> None:
    for shape in SHAPES:
        matrix = random_deltas(1, shape, 5)[0].double()
        found = low_rank_svd(matrix, 1e-6)
        assert found is not None
        u, s, v = found
        np.testing.assert_allclose(s, torch.linalg.svdvals(matrix)[:5], rtol=1e-12)
        for side in (u, v):
            np.testing.assert_allclose(side.T @ side, np.eye(5), atol=1e-10)
        close((u * s) @ v.T, matrix, 1e-6)
        again = low_rank_svd(matrix * 1e-9, 1e-6, largest=float(s[0]))
        assert again is not None
        assert len(again[1]) == 0
        nothing = low_rank_svd(matrix * 0, 1e-6)
        assert nothing is not None
        assert len(nothing[1]) == 0


@pytest.mark.parametrize("weakest", [6e-7, 1e-3, 1.0])
def test_ranks_that_are_not_low_for_certain_are_not_decided(narrow: None, weakest: float) -> None:
    """One direction between half the limit and the limit, or more directions than fit"""
    matrix = random_deltas(1, (160, 200))[0].double()
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.full((160,), 0.0 if weakest < 1e-6 else weakest, dtype=torch.float64)
    s[:5], s[5] = 1.0, weakest
    assert low_rank_svd((u * s) @ vt, 1e-6) is None


def test_iso_cts_takes_no_noise_for_directions() -> None:
    """Three tasks of rank 2, whose sum has all their directions: there is nothing beside it"""
    for shape in ((24, 24), (40, 18), (18, 40)):
        deltas = random_deltas(3, shape, 2)
        close(merge("iso_cts", deltas), merge("iso_c", deltas), 1e-6)
