"""compressed-tensors: what is read is what the library's own decompression gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import Tensors, compressed, holds, make, numbers, without

from merge.errors import CheckpointError

pytest.importorskip("compressed_tensors")
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 groups": ("pack-quantized", GROUPS | {"symmetric": True}),
    "int4 groups, zeros": ("pack-quantized", GROUPS | {"symmetric": False}),
    "int4 rows": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8 groups": ("pack-quantized", GROUPS | {"num_bits": 8, "symmetric": True}),
    "int8 rows, zeros": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int3 groups, zeros": ("pack-quantized", GROUPS | {"num_bits": 3, "symmetric": False}),
    "int2 groups": ("pack-quantized", GROUPS | {"num_bits": 2, "symmetric": True}),
    "int5 groups": ("pack-quantized", GROUPS | {"num_bits": 5, "symmetric": True}),
    "int8 plain, rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8 plain, tensor": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}),
    "int8 plain, zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_library_makes_of_it(tmp_path: Path, name: str) -> None:
    kind, weights = CASES[name]
    stored, config, expected = compressed(40, 96, kind, **weights)
    checkpoint = make(tmp_path, stored | {"n.weight": torch.ones(3)}, config)
    assert sorted(checkpoint.tensors) == ["l.weight", "n.weight"]
    found = numbers(checkpoint, "l.weight")
    assert found.any()
    rounded = torch.from_numpy(found).to(torch.bfloat16).float().numpy()
    # The library multiplies in bfloat16; where it does so with a scale that was rounded to it, it is one step away.
    np.testing.assert_allclose(rounded, expected.float().numpy(), rtol=2**-7 if name == "nvfp4" else 0)
    for step in (7, 96, 1000):
        np.testing.assert_array_equal(numbers(checkpoint, "l.weight", step), found)


def test_nvfp4_by_its_definition(tmp_path: Path) -> None:
    kind, weights = CASES["nvfp4"]
    stored, config, _ = compressed(40, 96, kind, **weights)
    packed = stored["l.weight_packed"].numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(40, 96)
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes >= 8, -1.0, 1.0)
    scale = stored["l.weight_scale"].double().numpy() / stored["l.weight_global_scale"].double().numpy()
    found = numbers(make(tmp_path, stored, config), "l.weight")
    np.testing.assert_allclose(found, size * np.repeat(scale, 16, axis=1), rtol=2**-23)


def test_activation_order(tmp_path: Path) -> None:
    kind, weights = CASES["int4 groups, zeros"]
    stored, config, _ = compressed(40, 96, kind, **weights)
    plain = numbers(make(tmp_path / "plain", stored, config), "l.weight")
    order = np.random.default_rng(0).permutation(96)
    groups = (np.arange(96) // 32)[order]
    # Each column as it is, with the group of another: what the columns of that group would be with these codes.
    stored["l.weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    found = numbers(make(tmp_path / "ordered", stored, config), "l.weight")
    same = groups == np.arange(96) // 32
    assert same.any()
    assert not same.all()
    np.testing.assert_array_equal(found[:, same], plain[:, same])
    scales = stored["l.weight_scale"].float().numpy()
    codes = plain / np.repeat(scales, 32, axis=1)  # code - zero of its own group
    zeros = np.stack([_unpacked_zeros(stored, 40, column) for column in range(3)], axis=1)
    moved = codes + np.repeat(zeros, 32, axis=1) - zeros[:, groups]
    np.testing.assert_allclose(found, moved * scales[:, groups], rtol=1e-5, atol=1e-6)


def _unpacked_zeros(stored: Tensors, rows: int, column: int) -> np.ndarray[Any, Any]:
    words = stored["l.weight_zero_point"][:, column].numpy().view(np.uint32)
    return np.array([((int(words[row // 8]) >> (4 * (row % 8))) & 15) - 8 for row in range(rows)])


@pytest.mark.parametrize(
    ("case", "change", "phrase"),
    [
        ("int4 groups", without("l.weight_scale"), "compressed-tensors without l.weight_scale"),
        ("int4 groups", without("l.weight_shape"), "compressed-tensors without l.weight_shape"),
        ("int4 groups", without("l.weight_packed"), "belongs to no weight"),
        ("int4 groups, zeros", without("l.weight_zero_point"), "compressed-tensors without l.weight_zero_point"),
        ("int4 groups", holds("l.weight_scale", torch.ones(40, 5)), "[40, 5] scales do not fit l.weight [40, 96]"),
        ("int4 groups", holds("l.weight_scale", torch.ones(39, 3)), "[39, 3] scales do not fit"),
        ("int4 groups", holds("l.weight_scale", torch.ones(40, 3, dtype=torch.int32)), "dtype I32, expected F32"),
        ("int4 groups", holds("l.weight_shape", torch.tensor([40, 97])), "12 words a row for 97 values"),
        ("int4 groups", holds("l.weight_shape", torch.tensor([41, 96])), "does not hold a weight of [41, 96]"),
        ("int4 groups", holds("l.weight_shape", torch.tensor([-1, 96])), "is no tensor's shape"),
        ("int4 groups", holds("l.weight_shape", torch.ones(2)), "dtype F32, expected I64 or I32"),
        ("int4 groups, zeros", holds("l.weight_zero_point", torch.ones(4, 3).int()), "[4, 3] does not fit l.weight"),
        ("int4 groups", holds("l.weight_g_idx", torch.zeros(95).int()), "[95] does not fit l.weight; expected [96]"),
        ("int4 groups", holds("l.weight", torch.ones(40, 96)), "the model also has l.weight"),
        ("int8 plain, rows", without("l.weight_scale"), "compressed-tensors without l.weight_scale"),
        ("int8 plain, rows", holds("l.weight_scale", torch.ones(3)), "[3] scales do not fit l.weight [40, 96]"),
        ("int8 plain, zeros", holds("l.weight_zero_point", torch.ones(3).char()), "[3] does not fit l.weight"),
        ("nvfp4", without("l.weight_global_scale"), "compressed-tensors without l.weight_global_scale"),
        ("nvfp4", holds("l.weight_scale", torch.ones(40, 3)), "[40, 3] does not fit l.weight; expected [40, 6]"),
        ("mxfp4", without("l.weight_scale"), "compressed-tensors without l.weight_scale"),
        ("mxfp4", holds("m.weight_scale", torch.ones(2)), "belongs to no weight"),
        ("fp8", without("l.weight_scale"), "FP8 without its scales"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, case: str, change: Callable[[Tensors], None], phrase: str
) -> None:
    kind, weights = CASES[case]
    stored, config, _ = compressed(40, 96, kind, **weights)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, config)
    assert phrase in str(caught.value)


def test_a_group_that_is_not_there_is_refused_when_it_is_read(tmp_path: Path) -> None:
    kind, weights = CASES["int4 groups"]
    stored, config, _ = compressed(40, 96, kind, **weights)
    stored["l.weight_g_idx"] = torch.full((96,), 3, dtype=torch.int32)
    with pytest.raises(CheckpointError) as caught:
        numbers(make(tmp_path, stored, config), "l.weight")
    assert "names groups 3 to 3; l.weight has 3" in str(caught.value)


@pytest.mark.parametrize("format_", ["sparse-24-bitmask", "sparse-bitmask", "marlin-24", "mxfp6-pack-quantized"])
def test_sparse_formats_are_refused_by_name(tmp_path: Path, format_: str) -> None:
    _, config, _ = compressed(40, 96, *CASES["int4 groups"][:1], **CASES["int4 groups"][1])
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, {"l.weight": torch.ones(2)}, config | {"format": format_})
    assert f"'{format_}' of compressed-tensors is not read" in str(caught.value)


def test_two_formats_in_one_model(tmp_path: Path) -> None:
    packed, config, expected = compressed(40, 96, "pack-quantized", **CASES["int4 groups"][1])
    floats, more, other = compressed(40, 96, "float-quantized", seed=1, **CASES["fp8"][1])
    floats = {name.replace("l.", "m."): part for name, part in floats.items()}
    config["config_groups"]["group_1"] = more["config_groups"]["group_0"]
    checkpoint = make(tmp_path, packed | floats, config | {"format": "mixed-precision"})
    assert sorted(checkpoint.tensors) == ["l.weight", "m.weight"]
    assert len(checkpoint.notes) == 2
    for name, meant in (("l.weight", expected), ("m.weight", other)):
        rounded = torch.from_numpy(numbers(checkpoint, name)).to(torch.bfloat16)
        assert torch.equal(rounded, meant.to(torch.bfloat16))
