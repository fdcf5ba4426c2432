"""bitsandbytes: what is read is what its own dequantisation gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import Tensors, bitsandbytes_4bit, holds, make, numbers, without

from merge.errors import CheckpointError

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "l.weight.quant_state.bitsandbytes__nf4"
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns"), [(40, 100), (33, 7), (64, 96)])
def test_four_bits_are_what_bitsandbytes_makes_of_them(
    tmp_path: Path, kind: str, nested: bool, rows: int, columns: int
) -> None:
    stored, expected = bitsandbytes_4bit(rows, columns, kind, nested, "float32")
    checkpoint = make(tmp_path, stored | {"n.weight": torch.ones(3)}, NF4 | {"bnb_4bit_quant_type": kind})
    assert sorted(checkpoint.tensors) == ["l.weight", "n.weight"]
    assert checkpoint.tensors["l.weight"].dtype == "F32"
    assert any(note == "bitsandbytes: 1 weight decoded while reading" for note in checkpoint.notes)
    found = numbers(checkpoint, "l.weight")
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    for step in (7, columns, 64, 130):
        np.testing.assert_array_equal(numbers(checkpoint, "l.weight", step), found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_four_bits_in_the_dtype_they_were_quantised_from(tmp_path: Path, dtype: str) -> None:
    stored, expected = bitsandbytes_4bit(64, 96, "nf4", True, dtype)
    checkpoint = make(tmp_path, stored, NF4)
    assert checkpoint.tensors["l.weight"].dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    rounded = torch.from_numpy(numbers(checkpoint, "l.weight")).to(getattr(torch, dtype))
    assert torch.equal(rounded.float(), torch.from_numpy(expected))


def test_codes_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    stored, _ = bitsandbytes_4bit(64, 96, "nf4", False, "bfloat16")
    expected = numbers(make(tmp_path / "bytes", stored, NF4), "l.weight")
    stored["l.weight"] = stored["l.weight"].reshape(-1).view(torch.bfloat16)[:, None]
    np.testing.assert_array_equal(numbers(make(tmp_path / "floats", stored, NF4), "l.weight"), expected)


def test_eight_bits_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    from bitsandbytes import functional

    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(codes, largest)
    stored = {"l.weight": codes, "l.SCB": largest, "l.weight_format": torch.zeros((), dtype=torch.uint8)}
    checkpoint = make(tmp_path, stored, INT8)
    assert list(checkpoint.tensors) == ["l.weight"]
    found = numbers(checkpoint, "l.weight")
    exact = codes.double().numpy() * largest.double().numpy()[:, None] / 127
    np.testing.assert_allclose(found, exact, rtol=2**-23)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2**-22)  # theirs rounds three times
    np.testing.assert_array_equal(numbers(checkpoint, "l.weight", 13), found)


def _state(**changes: object) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [40, 100]} | changes
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (without("l.weight.absmax"), "l.weight: bitsandbytes without l.weight.absmax"),
        (without("l.weight.quant_map"), "l.weight: bitsandbytes without l.weight.quant_map"),
        (without(STATE), f"l.weight: bitsandbytes without {STATE}"),
        (without("l.weight"), "belongs to no weight of this model"),
        (holds("l.weight.absmax", torch.ones(62)), "l.weight.absmax: [62] does not fit l.weight; expected [63]"),
        (holds("l.weight.absmax", torch.ones(63, dtype=torch.int32)), "dtype I32, expected F32 or F16 or BF16"),
        (holds("l.weight.quant_map", torch.ones(15)), "l.weight.quant_map: [15] does not fit"),
        (
            holds("l.weight", torch.zeros(1999, 1, dtype=torch.uint8)),
            "1,999 bytes of codes; expected 2,000 for",
        ),
        (holds(STATE, _state(shape=[1 << 50, 1 << 50])), "is no tensor's shape"),
        (holds(STATE, _state(shape="40")), "is no tensor's shape"),
        (holds(STATE, _state(blocksize=0)), "blocksize: expected a size of blocks that bitsandbytes has, found 0"),
        (holds(STATE, _state(dtype="int4")), "dtype: expected float32, float16 or bfloat16, found 'int4'"),
        (holds(STATE, _state(**NESTED)), "without l.weight.nested_absmax"),
        (holds(STATE, _state(**NESTED | {"nested_offset": None})), "nested_offset: expected a finite number"),
        (holds(STATE, torch.zeros(9, dtype=torch.uint8)), "is not valid JSON"),
        (holds(STATE, torch.zeros(1 << 17, dtype=torch.uint8)), "131,072 bytes; a description of a weight has at most"),
    ],
)
def test_four_bits_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Tensors], None], phrase: str) -> None:
    stored, _ = bitsandbytes_4bit(40, 100, "nf4", False, "float32")
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, NF4)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (without("l.SCB"), "l.weight: bitsandbytes without l.SCB"),
        (holds("l.SCB", torch.ones(5)), "l.SCB: [5] does not fit l.weight; expected [4]"),
        (holds("l.weight_format", torch.ones((), dtype=torch.uint8)), "an order for one kind of GPU"),
        (holds("m.SCB", torch.ones(4)), "m.SCB: bitsandbytes: belongs to no weight"),
        (without("l.weight"), "belongs to no weight"),
    ],
)
def test_eight_bits_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[[Tensors], None], phrase: str) -> None:
    stored: dict[str, Any] = {"l.weight": torch.ones(4, 6, dtype=torch.int8), "l.SCB": torch.ones(4)}
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, stored, INT8)
    assert phrase in str(caught.value)


def test_packed_weights_are_recognised_without_a_config(tmp_path: Path) -> None:
    stored, _ = bitsandbytes_4bit(8, 8, "nf4", False, "float32")
    assert list(make(tmp_path, stored, None).tensors) == ["l.weight"]


def test_a_config_without_quantised_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, {"l.weight": torch.ones(2, 2)}, NF4)
    assert "says bitsandbytes, but no tensor is stored so. Remove quantization_config" in str(caught.value)
