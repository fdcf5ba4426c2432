"""merge analyse, what it measures: every measure against numpy in float64, or by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from analysed import Tensors, analysis_of, base_tensors, low_rank, moved, noise, write_model
from analysed import stored as stored_as_float32

from merge.architecture.tensor_kinds import role_of
from merge.kernels.deltas import ALONE, DeltaLayout, delta_sums
from merge.kernels.protocol import Block
from merge.kernels.selection import KEEP_ALL, Threshold
from merge.one_thread import ONE_THREAD
from merge.tools.analyse import spectra as by_matrix
from merge.tools.analyse.elements import DENSITIES, DeltaSums
from merge.tools.analyse.spectra import interference, overlap, spectrum


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return stored_as_float32(values, dtype).astype(np.float64)


def trimmed(delta: np.ndarray) -> list[np.ndarray]:
    """By density, the k = max(1, floor(density n)) largest magnitudes; of equal ones those of lowest flat index"""
    flat = delta.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")
    found = []
    for density in DENSITIES:
        kept = np.zeros_like(flat)
        largest = order[: max(1, int(density * flat.size))]
        kept[largest] = flat[largest]
        found.append(kept)
    return found


@pytest.fixture(scope="module", params=["F32", "BF16"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """base, and three fine-tunes; at this width a matrix has several chunks."""
    path, base = tmp_path_factory.mktemp("family"), base_tensors(hidden=288, layers=1)
    write_model(path / "base", base, request.param)
    for seed, name in enumerate("abc", 1):
        write_model(path / name, moved(base, noise(seed, 0.001 * seed)), request.param)
    return path, request.param


def test_measures_by_element_are_those_of_numpy(family: tuple[Path, str]) -> None:
    path, dtype = family
    found = analysis_of(*(path / name for name in ("base", "a", "b", "c")), matrices=0)
    base = base_tensors(hidden=288, layers=1)
    tuned = [moved(base, noise(seed, 0.001 * seed)) for seed in (1, 2, 3)]
    assert {tensor.name for tensor in found.tensors} == {*base}
    for tensor in found.tensors:
        b = stored(base[tensor.name], dtype)
        x = [stored(each[tensor.name], dtype) for each in tuned]
        d = [each - b for each in x]
        kept = [trimmed(each) for each in d]
        ulp = 2.0 ** (np.frexp(b)[1] - 1 - 7)
        measures = tensor.measures
        for m, one in enumerate(measures.models):
            size = np.abs(d[m])
            assert one.norm == pytest.approx(np.linalg.norm(d[m]), rel=1e-12)
            assert one.relative == pytest.approx(np.linalg.norm(d[m]) / np.linalg.norm(b), rel=1e-12)
            cosine = (x[m] * b).sum() / np.linalg.norm(x[m]) / np.linalg.norm(b)
            assert one.weight_cosine == pytest.approx(cosine, rel=1e-12)
            assert one.changed == (d[m] != 0).mean()
            assert one.largest == size.max()
            assert one.lost == pytest.approx(size[size < ulp / 2].sum() / size.sum(), rel=1e-12, abs=1e-15)
            assert one.lost_at_share == pytest.approx(size[size / 3 < ulp / 2].sum() / size.sum(), rel=1e-12)
            energy = [(each**2).sum() / (d[m] ** 2).sum() for each in kept[m]]
            assert one.energy == pytest.approx(energy, rel=1e-12)
        for (i, j), pair in zip(found.pairs, measures.pairs, strict=True):
            cosine = (d[i] * d[j]).sum() / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
            assert pair.cosine == pytest.approx(cosine, rel=1e-10, abs=1e-14)
            for level, (u, v) in enumerate(zip(kept[i], kept[j], strict=True)):
                both = (u != 0) & (v != 0)
                if both.any():
                    assert pair.conflict[level] == (np.sign(u) != np.sign(v))[both].mean()
                gone = 1 - np.abs(u + v).sum() / (np.abs(u) + np.abs(v)).sum()
                assert pair.cancelled[level] == pytest.approx(gone, rel=1e-9, abs=1e-12)
                assert pair.overlap[level] == pytest.approx(both.sum() / min((u != 0).sum(), (v != 0).sum()), rel=1e-12)
        gone = 1 - np.abs(sum(d)).sum() / sum(np.abs(each).sum() for each in d)
        assert measures.cancelled[0] == pytest.approx(gone, rel=1e-10)
        mean = math.sqrt(sum((each**2).sum() for each in d) / 3)
        assert measures.equal_length == pytest.approx(mean / np.linalg.norm(sum(d)), rel=1e-10)


def test_groups_are_measured_as_one_tensor(family: tuple[Path, str]) -> None:
    path, dtype = family
    found = analysis_of(path / "base", path / "a", path / "b", matrices=0)
    base = base_tensors(hidden=288, layers=1)
    tuned = [moved(base, noise(seed, 0.001 * seed)) for seed in (1, 2)]
    names = [name for name in base if ".mlp." in name]
    u, v = (np.concatenate([(stored(x[n], dtype) - stored(base[n], dtype)).ravel() for n in names]) for x in tuned)
    tensors = [tensor for tensor in found.tensors if tensor.name in names]
    (pair,) = DeltaSums.total([tensor.sums for tensor in tensors]).measures().pairs
    assert pair.cosine == pytest.approx((u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v), rel=1e-10)
    gate = found.group("gate", 0)
    assert gate is not None
    assert gate.measures == next(tensor.measures for tensor in tensors if "gate" in tensor.name)
    assert found.roles == ["embedding", "q", "k", "v", "o", "gate", "up", "down", "norm", "head"]
    assert found.layers == [0]


def test_signs_and_rounding_by_hand() -> None:
    """Base 1: half an ulp of bfloat16 is 2^-8 above it. Two entries agree, one conflicts, one only a changes."""
    base = np.ones(4, np.float32)
    a, b = np.float32([2.0**-9, 0.5, -0.25, 0.125]), np.float32([2.0**-7, 0.25, 0.75, 0])
    layout = DeltaLayout(2, 2)
    raw = np.stack([base, base + a, base + b])
    half = Threshold(int(np.float32(0.25).view(np.uint32)), 4)  # keeps magnitudes from 1/4
    sums = delta_sums(Block(0, raw), [[KEEP_ALL] * 2, [half] * 2], 0.5, layout)
    squares, alone, kept, pairs, joint = layout.parts(sums)
    assert squares.tolist() == [4]
    rows = [dict(zip(ALONE, row, strict=True)) for row in alone.tolist()]
    assert [row["changed"] for row in rows] == [4, 3]
    assert [row["lost"] for row in rows] == [2.0**-9, 0]
    assert [row["lost_at_share"] for row in rows] == [2.0**-9, 0]  # 2^-7 / 2 is half an ulp, and not below it
    assert [row["largest"] for row in rows] == [0.5, 0.75]
    product, both, opposed, together = pairs[0, 0].tolist()
    assert (both, opposed) == (3, 1)
    assert product == 2.0**-16 + 0.125 - 0.1875
    assert together == 2.0**-9 + 2.0**-7 + 0.75 + 0.5 + 0.125 == joint[0]
    assert kept[1, :, 2].tolist() == [2, 2]  # 0.5, -0.25 and 0.25, 0.75
    assert pairs[1, 0].tolist() == [0.125 - 0.1875, 2, 1, 1.25]


def test_equal_magnitudes_are_trimmed_by_their_place() -> None:
    raw = np.stack([np.zeros(6, np.float32), np.float32([1, -1, 1, 1, -1, 1])])
    layout = DeltaLayout(1, 1)
    one = int(np.float32(1).view(np.uint32))
    for start, cut, count in ((0, 4, 4), (10, 12, 2), (10, 4, 0)):
        kept = layout.parts(delta_sums(Block(start, raw), [[Threshold(one, cut)]], 1.0, layout))[2]
        assert kept[0, 0].tolist() == [count] * 3


def test_any_number_of_threads_gives_the_same(family: tuple[Path, str]) -> None:
    path = family[0]
    paths = [path / name for name in ("base", "a", "b")]
    assert analysis_of(*paths, threads=1) == analysis_of(*paths, threads=3)


def test_float64_is_read_as_float32_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = moved(base, noise(1))
    write_model(tmp_path / "base", base, "F64")
    write_model(tmp_path / "plain", base)
    tuned["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    write_model(tmp_path / "a", tuned, "F64")
    write_model(tmp_path / "b", tuned)
    wide, narrow = analysis_of(tmp_path / "base", tmp_path / "a"), analysis_of(tmp_path / "plain", tmp_path / "b")
    assert [tensor.sums.values for tensor in wide.tensors] == [tensor.sums.values for tensor in narrow.tensors]
    assert wide.left_out == (("model.layers.0.mlp.up_proj.weight", "has NaN or infinite numbers"),)
    assert len(wide.tensors) == len(base) - 1


# Matrices.


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with ONE_THREAD:
        yield


def matrix(seed: int, values: np.ndarray, shape: tuple[int, int] = (300, 200)) -> torch.Tensor:
    """float32 with these singular values"""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.standard_normal((n, len(values))))[0] for n in shape)
    return torch.from_numpy(((u * values) @ v.T).astype(np.float32))


@pytest.mark.parametrize(
    "values",
    [np.ones(8), np.arange(1, 201.0)[::-1], 1 / np.arange(1, 201.0), np.ones(200)],
    ids=["rank 8", "linear", "1/k", "flat"],
)
def test_effective_rank_and_energy_are_those_of_the_singular_values(values: np.ndarray) -> None:
    found, _ = spectrum(matrix(1, values), 0.0, "key")
    assert found is not None
    squares = values**2
    assert found.effective_rank == pytest.approx(squares.sum() ** 2 / (squares**2).sum(), rel=0.08)
    energy = np.cumsum(squares) / squares.sum()
    assert found.energy == pytest.approx([energy[min(r, len(values)) - 1] for r in by_matrix.RANKS], rel=0.1, abs=1e-5)
    assert found.rank == (8 if len(values) == 8 else None)


@pytest.mark.parametrize("size", [0.1, 0.01, 0.003])
def test_rank_is_found_under_the_rounding_of_bfloat16(size: float) -> None:
    """size: of the delta relative to the base"""
    random = np.random.default_rng(3)
    base = torch.from_numpy(0.02 * random.standard_normal((300, 200))).bfloat16()
    delta = torch.from_numpy(random.standard_normal((300, 12)) @ random.standard_normal((12, 200)))
    tuned = (base.double() + delta * (size * base.double().norm() / delta.norm())).bfloat16()
    change = tuned.float() - base.float()
    binade = 2.0 ** (torch.frexp(tuned.float())[1].double() - 1)
    rounding = float(binade.square().sum()) * 2.0**-14 / 12 / float(change.double().square().sum())
    found, _ = spectrum(change, min(1.0, rounding), "key")
    assert found is not None
    assert found.rank == 12


def test_interference_and_overlap_follow_their_definitions() -> None:
    deltas = [matrix(seed, np.arange(20, 0, -1.0)) for seed in (1, 2)]
    _, a = spectrum(deltas[0], 0.0, "a")
    _, b = spectrum(deltas[1], 0.0, "b")
    assert a is not None
    assert b is not None
    a, b = a.first(16), b.first(16)
    u, s, v = (np.concatenate([x.numpy(), y.numpy()], -1) for x, y in ((a.u, b.u), (a.s, b.s), (a.v, b.v)))
    expected = np.abs((u.T @ u - np.eye(32)) @ np.diag(s) @ (v.T @ v - np.eye(32))).sum() / s.sum()
    assert interference([a, b]) == pytest.approx(expected, rel=1e-4)
    assert interference([a]) is None
    assert overlap(a.u, a.u) == pytest.approx(1, abs=1e-4)
    exact = [np.linalg.svd(delta.double().numpy()) for delta in deltas]
    left, right = exact[0][0][:, :16].T @ exact[1][0][:, :16], exact[0][2][:16] @ exact[1][2][:16].T
    assert overlap(a.u, b.u) == pytest.approx((left**2).sum() / 16, rel=1e-3)
    assert overlap(a.v, b.v) == pytest.approx((right**2).sum() / 16, rel=1e-3)


def test_large_matrices_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_tensors(hidden=64, layers=1)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", moved(base, low_rank(1, 3, ("gate_proj",))))
    monkeypatch.setattr(by_matrix, "LIMIT", 64 * 20)
    shapes = []
    monkeypatch.setattr(by_matrix, "spectrum", lambda d, *more: shapes.append(d.shape) or spectrum(d, *more))
    found = analysis_of(tmp_path / "base", tmp_path / "a", threads=1)
    assert max(math.prod(shape) for shape in shapes) <= by_matrix.LIMIT
    gate = next(tensor for tensor in found.tensors if tensor.role == "gate")
    assert gate.spectra is not None
    assert gate.spectra.models[0] is not None
    assert gate.spectra.models[0].rank == 3


def test_matrices_are_sampled_over_roles_and_layers(tmp_path: Path) -> None:
    base: Tensors = base_tensors(layers=4)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "a", moved(base, noise(1)))
    found = analysis_of(tmp_path / "base", tmp_path / "a", matrices=16)
    looked = [(tensor.role, tensor.layer) for tensor in found.tensors if tensor.spectra is not None]
    assert len(looked) == 16
    assert [layer for role, layer in looked if role == "down"] == [0, 2]
    assert {role for role, _ in looked} == {*found.roles} - {"norm"}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "q"),
        ("model.layers.0.self_attn.q_proj.bias", "q"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "qkv"),
        ("transformer.h.0.attn.c_proj.weight", "o"),
        ("transformer.h.0.mlp.c_proj.weight", "down"),
        ("bert.encoder.layer.0.attention.self.query.weight", "q"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "o"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "up"),
        ("bert.encoder.layer.0.output.dense.weight", "down"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "down"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "gate"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.0.mixer.conv1d.weight", "other"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role
