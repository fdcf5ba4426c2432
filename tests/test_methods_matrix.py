"""Methods that decompose matrices: against the SVD they are defined by, and the identities of their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.kernels.spectral import polar, polar_beside, thin_svd
from merge.methods import get_method
from merge.methods.tsv import factors
from merge.one_thread import _OneThread

NAMES = ("tsv", "iso_c", "iso_cts", "wudi")
SHAPES = [(24, 24), (40, 18), (18, 40), (1, 9), (9, 1), (1, 1)]


def merge(name: str, deltas: Tensor, **parameters: Any) -> Tensor:
    """With defaults for what is not given"""
    method = get_method(name)
    assert method is not None
    keywords = {
        ("lambda_" if p.name == "lambda" else p.name): (p.default,) * len(deltas) if p.per_model else p.default
        for p in method.parameters
    }
    merged: Tensor = method.reference(deltas, **(keywords | parameters))
    return merged


def random_deltas(n: int, shape: tuple[int, ...], rank: int | None = None, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    if rank is None:
        return torch.from_numpy(random.standard_normal((n, *shape)) * 1e-3).to(torch.float32)
    left, right = random.standard_normal((n, shape[0], rank)), random.standard_normal((n, rank, shape[1]))
    return torch.from_numpy(left @ right * 1e-3).to(torch.float32)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert torch.linalg.vector_norm(got - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def textbook_tsv(deltas: Tensor) -> Tensor:
    keep = min(deltas.shape[1:]) // len(deltas)
    parts = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    u = nearest_orthogonal(torch.cat([u[:, :keep] for u, _, _ in parts], 1))
    v = nearest_orthogonal(torch.cat([v[:keep] for _, _, v in parts]))
    return u @ torch.diag(torch.cat([s[:keep] for _, s, _ in parts])) @ v


def textbook_iso_cts(deltas: Tensor, common: float) -> Tensor:
    rank = min(deltas.shape[1:])
    own = round((rank - int(rank * common)) / len(deltas))
    u, s, v = torch.linalg.svd(deltas.double().sum(0), full_matrices=False)
    keep = rank - own * len(deltas)
    us, ss, vs = [u[:, :keep]], [s[:keep]], [v[:keep]]
    for delta in deltas.double():
        a, b, c = torch.linalg.svd(delta - us[0] @ us[0].T @ delta, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, c[:own]]
    return torch.cat(ss).mean() * nearest_orthogonal(torch.cat(us, 1)) @ nearest_orthogonal(torch.cat(vs))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(24, 24), (40, 18), (18, 40)])
def test_results_are_those_of_the_singular_value_decompositions(shape: tuple[int, int], n: int) -> None:
    deltas = random_deltas(n, shape)
    close(merge("tsv", deltas), textbook_tsv(deltas))
    close(merge("iso_c", deltas), textbook_iso_cts(deltas, 1.0))
    for common in (0.0, 0.5, 0.8):
        close(merge("iso_cts", deltas, common=common), textbook_iso_cts(deltas, common))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 6, 5)])
def test_one_task_is_that_model(shape: tuple[int, ...]) -> None:
    deltas = random_deltas(1, shape)
    close(merge("tsv", deltas), deltas[0].double(), 1e-12)
    close(merge("wudi", deltas), deltas[0].double(), 1e-12)
    close(merge("iso_cts", deltas), merge("iso_c", deltas), 1e-10)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_models_does_not_matter(name: str, rank: int | None) -> None:
    for shape in SHAPES:
        deltas = random_deltas(3, shape, rank)
        weight = (1.0, 0.5, 0.25)
        got = merge(name, deltas[[2, 0, 1]], weight=(0.25, 1.0, 0.5))
        close(got, merge(name, deltas, weight=weight), 1e-8)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_keeps_the_nuclear_norm_and_makes_directions_equal(shape: tuple[int, int], rank: int | None) -> None:
    deltas = random_deltas(3, shape, rank)
    total = (deltas.double() * torch.tensor([1.0, 0.5, -0.25]).view(3, 1, 1)).sum(0)
    wanted = torch.linalg.svdvals(total)
    got = torch.linalg.svdvals(merge("iso_c", deltas, weight=(1.0, 0.5, -0.25)))
    used = int((wanted > 1e-6 * wanted[0]).sum())
    assert used == min(*shape, 3 * rank if rank else min(shape))
    np.testing.assert_allclose(got.sum(), wanted[:used].sum(), rtol=1e-10)
    np.testing.assert_allclose(got[:used], wanted[:used].mean(), rtol=1e-8)
    np.testing.assert_allclose(got[used:], 0, atol=1e-12)


def test_iso_cts_directions_are_equal_and_of_the_strength_of_its_parts() -> None:
    got = torch.linalg.svdvals(merge("iso_cts", random_deltas(3, (30, 40))))
    np.testing.assert_allclose(got, got[0], rtol=1e-9)
    close(merge("iso_cts", random_deltas(3, (30, 40)), common=1.0), merge("iso_c", random_deltas(3, (30, 40))))


@pytest.mark.parametrize("ridge", [0.1, 1e-8])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (30, 90)])
def test_wudi_has_no_gradient(shape: tuple[int, int], rank: int | None, ridge: float) -> None:
    """Of sum_i w_i n |(M - d_i) d_i^T|^2 / |d_i|^2 and the ridge, relative to the sum of its terms' sizes"""
    deltas, weight = random_deltas(3, shape, rank), (1.0, 0.5, 2.0)
    merged = merge("wudi", deltas, weight=weight, ridge=ridge)
    gradient, size = torch.zeros_like(merged), 0.0
    for delta, w in zip(deltas.double(), weight, strict=True):
        strength = delta.T @ delta * shape[1] / (delta**2).sum()
        gradient += w * ((merged - delta) @ strength + ridge * (merged - delta))
        size += w * float(torch.linalg.vector_norm(delta @ strength))
    assert torch.linalg.vector_norm(gradient) < 1e-10 * size


def test_wudi_adds_what_is_apart_and_averages_what_is_shared() -> None:
    deltas = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    close(merge("wudi", deltas, ridge=1e-8), deltas.double().sum(0), 1e-6)
    deltas = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])  # one input direction: weights of 3 and 1 make 1.5
    close(merge("wudi", deltas, weight=(3.0, 1.0), ridge=1e-8), torch.tensor([[1.5, 0.0]], dtype=torch.float64), 1e-6)
    assert merge("wudi", deltas, weight=(0.0, 0.0)).abs().max() == 0


def test_wudi_draws_what_is_weak_to_the_mean() -> None:
    """One task's G is 2 / 10 [3 1]^T [3 1] + 2, the other's, a zero task vector, the ridge of 2 alone."""
    deltas = torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]])
    gram = 2 / 10 * torch.tensor([[9.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    wanted = deltas[0].double() @ (gram + 2 * torch.eye(2)) @ torch.linalg.inv(gram + 4 * torch.eye(2))
    close(merge("wudi", deltas, ridge=2.0), wanted, 1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_factors_of_tsv_are_orthogonal(rank: int | None) -> None:
    deltas = random_deltas(3, (30, 24), rank)
    for matrix in factors(list(deltas.double()), 8)[::2]:
        count = 24 if rank is None else 6
        assert matrix.shape[1] == count
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(count), atol=1e-10)


def test_tsv_of_tasks_that_are_orthogonal_is_their_sum_cut_to_rank() -> None:
    u, v = torch.linalg.qr(random_deltas(2, (12, 12)).double()).Q
    s = torch.arange(6, 0, -1.0, dtype=torch.float64)
    deltas = torch.stack([u[:, :6] * s @ v[:, :6].T, u[:, 6:] * s @ v[:, 6:].T])
    close(merge("tsv", deltas), deltas.sum(0), 1e-10)
    strongest = torch.stack([u[:, :3] * s[:3] @ v[:, :3].T, u[:, 6:9] * s[:3] @ v[:, 6:9].T])
    close(merge("tsv", deltas, density=0.5, lambda_=2.0), 2 * strongest.sum(0), 1e-10)


def test_tsv_of_copies_is_their_strongest_directions() -> None:
    delta = random_deltas(1, (12, 15))
    u, s, v = torch.linalg.svd(delta[0].double(), full_matrices=False)
    close(merge("tsv", delta.expand(3, -1, -1), weight=(2.0, 0.75, 0.25)), u[:, :4] * s[:4] @ v[:4], 1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_zero_task_vectors_and_lambda(name: str) -> None:
    deltas = random_deltas(3, (8, 6))
    deltas[1] = 0
    assert merge(name, deltas * 0).abs().max() == 0
    assert merge(name, deltas).isfinite().all()
    close(merge(name, deltas, lambda_=-0.5), -0.5 * merge(name, deltas), 1e-14)
    if name == "iso_c":
        close(merge(name, deltas), merge(name, deltas[[0, 2]]))


@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_a_tensor_are_apart_and_vectors_are_averaged(name: str) -> None:
    deltas = random_deltas(2, (2, 3, 8, 6))
    weight = (1.0, 0.5)
    got = merge(name, deltas, weight=weight)
    for i in range(2):
        for j in range(3):
            close(got[i, j], merge(name, deltas[:, i, j], weight=weight), 1e-12)
    vectors = random_deltas(2, (7,))
    divisor = 1.5 if name == "wudi" else 2
    close(merge(name, vectors, weight=weight), (vectors[0].double() + 0.5 * vectors[1]) / divisor, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_matrix_with_nan_is_lost(name: str) -> None:
    deltas = random_deltas(2, (2, 5, 4))
    deltas[1, 0, 2, 2] = torch.nan
    got = merge(name, deltas)
    assert got[0].isnan().all()
    close(got[1], merge(name, deltas[:, 1]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_results_scale_with_the_task_vectors(name: str, scale: float) -> None:
    deltas = random_deltas(3, (9, 12)).double()
    close(merge(name, deltas * scale) / scale, merge(name, deltas), 1e-6)


def test_a_thin_svd_leaves_noise_out() -> None:
    for shape in ((20, 30), (30, 20)):
        matrix = random_deltas(1, shape, rank=3)[0].double()
        u, s, v = thin_svd(matrix)
        assert len(s) == 3
        np.testing.assert_allclose(s, torch.linalg.svdvals(matrix)[:3], rtol=1e-12)
        np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-12)
        close(u * s @ v.T, matrix, 1e-6)
        assert len(thin_svd(matrix, 2)[1]) == 2
        assert len(thin_svd(matrix * 0)[1]) == 0


@pytest.mark.parametrize("extra", [1, 4, 12])
def test_the_polar_factor_beside_orthonormal_columns(extra: int) -> None:
    random = random_deltas(1, (20, 20)).double()[0]
    common, other = torch.linalg.qr(random[:, :8]).Q, random[:, 8 : 8 + extra] * 1e3
    wanted = nearest_orthogonal(torch.cat([common, other], 1))
    close(torch.cat(polar_beside(common, other), 1), wanted)
    close(polar(torch.cat([common, other], 1)), wanted)
    close(polar(torch.cat([common, other], 1).T), wanted.T)


def test_torch_keeps_to_one_thread_until_the_last_worker_is_out() -> None:
    before, hold = torch.get_num_threads(), _OneThread()
    try:
        torch.set_num_threads(3)
        with hold:
            with hold:
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
