"""GPTQ, AWQ and MXFP4, which store weights transposed: what is read is what the formats define."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import Tensors, awq, gptq, holds, make, mxfp4, numbers, without

from merge.errors import CheckpointError
from merge.sources import fp4, packed_columns

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MXFP4 = {"quant_method": "mxfp4"}


@pytest.fixture(params=[4 << 20, 1])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices read at once, and in many panels."""
    monkeypatch.setattr(packed_columns, "_PANEL", request.param)
    monkeypatch.setattr(packed_columns, "_NARROWEST", 32)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_by_its_definition(tmp_path: Path, bits: int, version: int, act_order: bool) -> None:
    stored, expected = gptq(160, 96, bits, 32, version=version, act_order=act_order)
    config = GPTQ | {"bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    checkpoint = make(tmp_path, stored | {"n.weight": torch.ones(3)}, config)
    assert sorted(checkpoint.tensors) == ["l.weight", "n.weight"]
    assert checkpoint.tensors["l.weight"].dtype == "F16"
    assert any("GPTQ: 1 weight decoded" in note for note in checkpoint.notes)
    found = numbers(checkpoint, "l.weight")
    np.testing.assert_array_equal(found, expected)  # exact: small integers times float16
    for step in (7, 96, 1000, 33 * 96):
        np.testing.assert_array_equal(numbers(checkpoint, "l.weight", step), found)


def test_gptq_without_groups_of_columns_and_without_g_idx(tmp_path: Path) -> None:
    stored, expected = gptq(32, 96, 4, 96)
    del stored["l.g_idx"]
    np.testing.assert_array_equal(numbers(make(tmp_path, stored, GPTQ), "l.weight"), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_nothing_in_version_1(tmp_path: Path, bits: int) -> None:
    """Writers subtract 1 from every field of a word at once, so a zero borrows from the next field."""
    stored, expected = gptq(32, 64, bits, 32, version=2, smallest=0)
    assert (expected >= 0).any()
    ones = sum(1 << place for place in range(0, 32, bits))
    words = stored["l.qzeros"].numpy().view(np.uint32) - np.uint32(ones)
    stored["l.qzeros"] = torch.from_numpy(words.view(np.int32))
    np.testing.assert_array_equal(numbers(make(tmp_path, stored, GPTQ | {"bits": bits}), "l.weight"), expected)


@pytest.mark.usefixtures("panels")
def test_awq_by_its_definition(tmp_path: Path) -> None:
    stored, expected = awq(160, 96, 32)
    checkpoint = make(tmp_path, stored, AWQ)
    assert list(checkpoint.tensors) == ["l.weight"]
    found = numbers(checkpoint, "l.weight")
    np.testing.assert_array_equal(found, expected)
    for step in (7, 96, 1000, 33 * 96):
        np.testing.assert_array_equal(numbers(checkpoint, "l.weight", step), found)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = mxfp4(3, 40, 4)
    expected = convert_moe_packed_tensors(stored["e.up_blocks"], stored["e.up_scales"])
    checkpoint = make(tmp_path, stored, MXFP4)
    assert checkpoint.tensors["e.up"].shape == (3, 128, 40)
    found = numbers(checkpoint, "e.up")
    np.testing.assert_array_equal(found, expected.float().numpy())  # exact: a power of two times a small number
    for step in (7, 40, 1000, 130 * 40):
        np.testing.assert_array_equal(numbers(checkpoint, "e.up", step), found)


def test_exponents_from_end_to_end() -> None:
    assert fp4.EXPONENTS[127] == 1
    assert fp4.EXPONENTS[0] == 2.0**-127
    assert fp4.EXPONENTS[254] == 2.0**127
    assert np.isnan(fp4.EXPONENTS[255])


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (without("l.qzeros"), "l.qweight: GPTQ without l.qzeros"),
        (without("l.scales"), "l.qweight: GPTQ without l.scales"),
        (without("l.qweight"), "belongs to no weight"),
        (holds("l.scales", torch.ones(2, 32).int()), "dtype I32, expected F32 or F16 or BF16"),
        (holds("l.scales", torch.ones(2, 31)), "are not codes of 2, 3, 4 or 8 bits"),
        (holds("l.scales", torch.ones(5, 32)), "l.qzeros: [2, 4] does not fit l.scales; expected [5, 4]"),
        (holds("l.qzeros", torch.ones(3, 4).int()), "[3, 4] does not fit l.scales; expected [2, 4]"),
        (holds("l.qzeros", torch.ones(2, 5).int()), "are not codes of 2, 3, 4 or 8 bits"),
        (holds("l.qweight", torch.ones(8, 32)), "dtype F32, expected I32"),
        (holds("l.qweight", torch.ones(8, 40).int()), "[8, 40] does not fit l.scales; expected [8, 32]"),
        (holds("l.qweight", torch.ones(8).int()), "expected three matrices"),
        (holds("l.g_idx", torch.zeros(63).int()), "[63] does not fit l.weight; expected [64]"),
        (holds("l.weight", torch.ones(32, 64)), "the model also has l.weight"),
        (holds("m.g_idx", torch.zeros(64).int()), "m.g_idx: GPTQ: belongs to no weight"),
    ],
)
def test_gptq_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Tensors], None], phrase: str) -> None:
    stored, _ = gptq(32, 64, 4, 32)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, GPTQ)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (without("l.qzeros"), "l.qweight: AWQ without l.qzeros"),
        (holds("l.scales", torch.ones(3, 64)), "[2, 8] does not fit l.qweight; expected [3, 8]"),
        (holds("l.scales", torch.ones(2, 63)), "l.scales: [2, 63] does not fit l.qweight; expected [2, 64]"),
        (holds("l.qweight", torch.ones(63, 8).int()), "2 groups do not divide 63 inputs"),
        (holds("l.qweight", torch.ones(64).int()), "expected two matrices"),
    ],
)
def test_awq_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Tensors], None], phrase: str) -> None:
    stored, _ = awq(64, 64, 32)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, AWQ)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (without("e.up_scales"), "e.up_blocks: MXFP4 without e.up_scales"),
        (without("e.up_blocks"), "belongs to no weight"),
        (holds("e.up_scales", torch.ones(3, 40, 3).byte()), "[3, 40, 3] does not fit e.up_blocks; expected [3, 40, 4]"),
        (holds("e.up_blocks", torch.ones(3, 40, 4, 15).byte()), "expected [experts, columns, groups, 16]"),
        (holds("e.up_scales", torch.ones(3, 40, 4)), "dtype F32, expected U8"),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Tensors], None], phrase: str) -> None:
    stored = mxfp4(3, 40, 4)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, MXFP4)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "phrase"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ in the layout 'marlin' is not read; expected gptq or gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ in the layout 'marlin'"),
        (GPTQ | {"checkpoint_format": ["gptq"]}, "GPTQ in the layout ['gptq']"),
        (AWQ | {"version": "gemv"}, "AWQ of 4 bits in the layout 'gemv' is not read; expected 4 and gemm"),
        (AWQ | {"bits": 8}, "AWQ of 8 bits"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], phrase: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, {"l.weight": torch.ones(2)}, quantization)
    assert phrase in str(caught.value)


def test_a_group_that_is_not_there_is_refused_when_it_is_read(tmp_path: Path) -> None:
    stored, _ = gptq(32, 64, 4, 32)
    stored["l.g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    with pytest.raises(CheckpointError) as caught:
        numbers(make(tmp_path, stored, GPTQ), "l.weight")
    assert "names groups -1 to -1; l.weight has 2" in str(caught.value)


def test_the_config_may_be_in_quantize_config_json(tmp_path: Path) -> None:
    stored, expected = gptq(32, 64, 4, 32)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    np.testing.assert_array_equal(numbers(make(tmp_path, stored, None), "l.weight"), expected)


def test_packed_weights_without_any_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, gptq(32, 64, 4, 32)[0], None)
    assert "l.qweight: packed weights, but config.json has no quantization_config" in str(caught.value)
