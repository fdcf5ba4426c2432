"""merge diff: every measure against numpy, what is missing or otherwise, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_inputs.room import call
from conftest import write_json
from safetensors.torch import load_file

from merge.chunks import CHUNK
from merge.errors import CheckpointError
from merge.kernels.difference import difference_of
from merge.recipe import parse_reference
from merge.tools import diff
from merge.tools.diff import Diff, diff_models


def compare(*paths: Path, threads: int | None = None) -> Diff:
    return diff_models(*[parse_reference(str(path)) for path in paths], threads=threads)


def wide(path: Path) -> dict[str, np.ndarray]:
    found = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {name: tensor.double().numpy() for name, tensor in found.items()}


@pytest.fixture
def family(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """base, and two fine-tunes; at this width a matrix has several chunks."""
    make_model(tmp_path / "base", hidden=512, dtype="BF16")
    for seed, name in enumerate("ab", 1):
        model = {"hidden": 512, "dtype": "BF16", "base": tmp_path / "base", "delta": 0.001}
        make_model(tmp_path / name, seed=seed, shards=seed, **model)
    return tmp_path


def test_measures_are_those_of_numpy(family: Path) -> None:
    found = compare(family / "a", family / "b", family / "base")
    a, b, c = (wide(family / name) for name in ("a", "b", "base"))
    assert [tensor.name for tensor in found.tensors] == list(load_file(family / "a" / "model.safetensors"))
    for tensor in found.tensors:
        x, y, z = a[tensor.name], b[tensor.name], c[tensor.name]
        u, v = x - z, y - z
        both = (u != 0) & (v != 0)
        expected = {
            "size": x.size,
            "changed": int((x != y).sum()),
            "share": (x != y).mean(),
            "relative": np.linalg.norm(y - x) / np.linalg.norm(x),
            "largest": np.abs(y - x).max(),
            "cosine": (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
            "nonfinite": 0,
            "norm_a": np.linalg.norm(u),
            "norm_b": np.linalg.norm(v),
            "task_cosine": (u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v),
            "both": int(both.sum()),
            "sign_agreement": (np.sign(u) == np.sign(v))[both].mean(),
        }
        assert tensor.sums.measures(True) == pytest.approx(expected, rel=1e-10, abs=1e-13)
    kinds = {kind: (n, sums) for kind, n, sums in found.by_kind()}
    assert list(kinds) == ["embedding", "attention", "mlp", "norm", "head", "all"]
    assert kinds["mlp"][0] == 6
    total = sum(((b[n] - a[n]) ** 2).sum() for n in a if ".mlp." in n)
    assert kinds["mlp"][1].dd == pytest.approx(total, rel=1e-12)
    assert [layer for layer, _ in found.by_layer()] == [0, 1]
    relative = [tensor.sums.measures(False)["relative"] for tensor in found.changed]
    assert relative == sorted(relative, reverse=True)


def test_any_threads_and_shards_give_the_same(family: Path) -> None:
    assert compare(family / "a", family / "b", threads=1) == compare(family / "a", family / "b", threads=5)


def test_a_model_equals_itself(family: Path) -> None:
    found = compare(family / "a", family / "a", family / "base")
    assert not found.is_different
    assert found.changed == ()
    measures = found.by_kind()[-1][2].measures(True)
    assert (measures["changed"], measures["relative"], measures["cosine"]) == (0, 0.0, 1.0)
    assert measures["task_cosine"] == pytest.approx(1)
    assert measures["sign_agreement"] == 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_dtypes_are_compared_by_their_numbers(
    tmp_path: Path, make_model: Callable[..., Path], dtype: str, family: Path
) -> None:
    make_model(tmp_path / "wide", hidden=512, dtype=dtype, seed=0)
    found = compare(family / "base", tmp_path / "wide")
    assert {tensor.dtypes for tensor in found.retyped} == {("BF16", dtype)}
    a, b = wide(family / "base"), wide(tmp_path / "wide")
    for tensor in found.tensors:
        x, y = a[tensor.name], b[tensor.name]
        measures = tensor.sums.measures(False)
        assert measures["changed"] == (x != y).sum() > 0
        assert measures["relative"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)


def test_what_is_missing_or_of_another_shape_is_listed(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "a", extra={"ids": np.arange(4), "gone": np.ones(3, np.float32), "grown": np.ones((2, 3))})
    make_model(tmp_path / "b", extra={"ids": np.array([0, 1, 5, 3]), "new": np.ones(2), "grown": np.ones((3, 3))})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    write_json(tmp_path / "b" / "config.json", config | {"rope_theta": 1e6, "nested": {"x": 1}})
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    (tmp_path / "b" / "tokenizer_config.json").unlink()
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found.added, found.removed) == (("new",), ("gone",))
    assert found.reshaped == (("grown", (2, 3), (3, 3)),)
    assert [(tensor.name, tensor.sums.changed) for tensor in found.changed] == [("ids", 1)]
    assert found.config == (("rope_theta", None, 1e6), ("nested", None, {"x": 1}))
    assert found.side_files == ("tokenizer.json", f"tokenizer_config.json (only in {tmp_path / 'a'})")


def test_prefixes_are_seen_through(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    from conftest import write_safetensors
    from safetensors.numpy import load_file as load

    make_model(tmp_path / "a")
    make_model(tmp_path / "b")
    tensors = load(tmp_path / "b" / "model.safetensors")
    write_safetensors(tmp_path / "b" / "model.safetensors", {f"x.{n}": (t, "float32") for n, t in tensors.items()})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert not found.is_different
    assert 'its names have the prefix "x."' in found.notes[0]


def test_nan_and_infinity_are_counted_apart(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    x = np.arange(8, dtype=np.float32)
    y = x.copy()
    y[0], y[3], x[5], y[5], x[6], y[6] = np.nan, 4, np.nan, np.nan, np.inf, -np.inf
    make_model(tmp_path / "a", extra={"x": x})
    make_model(tmp_path / "b", extra={"x": y})
    (found,) = compare(tmp_path / "a", tmp_path / "b").changed
    measures = found.sums.measures(False)
    assert (measures["changed"], measures["nonfinite"], measures["largest"]) == (3, 2, 1.0)
    assert measures["relative"] == pytest.approx(1 / np.sqrt(1 + 4 + 9 + 16 + 49))


def test_without_anything_to_divide_by_a_measure_is_none(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "a", extra={"zero": np.zeros(5, np.float32), "empty": np.zeros((0, 4), np.float32)})
    make_model(tmp_path / "b", extra={"zero": np.ones(5, np.float32), "empty": np.zeros((0, 4), np.float32)})
    found = {tensor.name: tensor.sums.measures(False) for tensor in compare(tmp_path / "a", tmp_path / "b").tensors}
    assert (found["zero"]["relative"], found["zero"]["cosine"], found["zero"]["share"]) == (None, None, 1.0)
    assert (found["empty"]["share"], found["empty"]["size"]) == (None, 0)


def test_a_base_that_lacks_tensors_is_noted(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    for name in "ab":
        make_model(tmp_path / name, extra={"more": np.full(3, ord(name), np.float32)})
    make_model(tmp_path / "base", seed=4)
    found = compare(tmp_path / "a", tmp_path / "b", tmp_path / "base")
    assert "lacks 1 of the tensors" in found.notes[0]
    with pytest.raises(CheckpointError):
        compare(tmp_path / "a", tmp_path)


def test_command(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call(["diff", "a", "b", "--base", "base", "--top", "3"])
    assert (code, err) == (0, "")
    assert "changed  21 of 21 tensors" in out
    assert "cos(A, B)" in out
    assert out.count("█" * 35) >= 1
    assert out.partition("most changed")[2].count("weight") == 3
    assert call(["diff", "a", "b", "--exit-code"])[0] == 1
    code, out, err = call(["diff", "a", "a", "--exit-code"])
    assert (code, out) == (0, "no difference: 21 tensors, config and tokenizer files are the same\n")
    code, out, err = call(["diff", "a", "b", "--json"])
    found = json.loads(out)
    assert (code, found["different"], len(found["tensors"]), len(found["layers"])) == (0, True, 21, 2)
    assert "task_cosine" not in found["kinds"]["all"]
    code, out, err = call(["diff", "a", "./nothing"])
    assert (code, 'there is no directory "./nothing"' in err) == (2, True)


def test_a_row_that_is_longer_than_a_chunk_is_cut_too(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.random.default_rng(0).standard_normal((1, 3 * CHUNK + 5), dtype=np.float32)
    numbers = np.arange(row.size).reshape(row.shape)
    make_model(tmp_path / "a", extra={"long": row, "numbers": numbers})
    row[0, -1], row[0, 7], numbers[0, -1] = np.nan, row[0, 7] + 1, 0
    make_model(tmp_path / "b", extra={"long": row, "numbers": numbers})
    widths = []
    monkeypatch.setattr(diff, "difference_of", lambda raw, out: widths.append(raw.shape[1]) or difference_of(raw, out))
    found = {tensor.name: tensor.sums for tensor in compare(tmp_path / "a", tmp_path / "b").tensors}
    assert max(widths) == CHUNK
    long = found["long"]
    assert (long.changed, long.nonfinite, long.largest) == (2, 1, pytest.approx(1.0, rel=1e-6))
    assert found["numbers"].changed == 1
