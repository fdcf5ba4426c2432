"""FP8 weights are read with their scales, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError
from merge.plan import Derived, Stored
from merge.recipe.model import ModelRef

E4M3 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}


def make(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None = None) -> Checkpoint:
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))
    return open_checkpoint(ModelRef("m", str(folder)))


def refused(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        make(folder, tensors, quantization)
    return str(caught.value)


def fp8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(50).to(E4M3)


def numbers(checkpoint: Checkpoint, name: str, step: int = 0) -> torch.Tensor:
    """All of a tensor, in float32, read in pieces of `step` elements."""
    ref = checkpoint.tensors[name]
    out = np.empty(ref.size, np.float32)
    with SourceReader(checkpoint.files) as reader:
        for start in range(0, ref.size, step or ref.size):
            part = out[start : start + (step or ref.size)]
            reader.read_values(ref, start, part)
    return torch.from_numpy(out).reshape(ref.shape)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (64, 64), (1, 500), (129, 3)])
def test_block_scales_as_torch_computes_them(tmp_path: Path, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    rows, columns = -(-shape[0] // 128), -(-shape[1] // 128)
    weight, scale = fp8(*shape), torch.rand(rows, columns).add(0.5).to(scale_dtype)
    checkpoint = make(tmp_path, {"l.weight": weight, "l.weight_scale_inv": scale, "n.weight": torch.ones(3)}, BLOCKS)
    assert set(checkpoint.tensors) == {"l.weight", "n.weight"}
    grid = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    expected = weight.float() * grid
    for step in (0, shape[1], 3 * shape[1], 7, 130):
        assert torch.equal(numbers(checkpoint, "l.weight", step), expected), step


def test_the_block_is_the_one_in_the_config(tmp_path: Path) -> None:
    weight, scale = fp8(8, 9), torch.rand(4, 3)
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    checkpoint = make(tmp_path, {"l.weight": weight, "l.weight_scale_inv": scale}, quantization)
    weight_of = checkpoint.tensors["l.weight"]
    assert isinstance(weight_of, Derived)
    assert weight_of.parameters["block"] == (2, 4)
    expected = weight.float() * scale.repeat_interleave(2, 0).repeat_interleave(4, 1)[:, :9]
    assert torch.equal(numbers(checkpoint, "l.weight", 9), expected)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (6,), (6, 1), (1, 5)])
@pytest.mark.parametrize("quantization", [COMPRESSED, {"quant_method": "fbgemm_fp8"}, None])
def test_scales_for_a_tensor_a_row_or_a_column(
    tmp_path: Path, scale_shape: tuple[int, ...], quantization: dict[str, Any] | None
) -> None:
    weight, scale = fp8(6, 5), torch.rand(scale_shape)
    checkpoint = make(tmp_path, {"l.weight": weight, "l.weight_scale": scale}, quantization)
    expected = weight.float() * (scale[:, None] if scale_shape == (6,) else scale)
    for step in (0, 5, 4):
        assert torch.equal(numbers(checkpoint, "l.weight", step), expected)


@pytest.mark.parametrize("scale_shape", [(3, 2, 2), (3,), (3, 1, 1), (3, 256, 1), (3, 1, 130), ()])
def test_scales_of_stacked_experts(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    weight, scale = fp8(3, 256, 130), torch.rand(scale_shape)
    checkpoint = make(tmp_path, {"e.up": weight, "e.up_scale": scale}, {"quant_method": "fp8"})
    grid = scale
    if scale_shape == (3, 2, 2):
        grid = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :, :130]
    elif scale_shape == (3,):
        grid = scale[:, None, None]
    for step in (0, 130 * 100):
        assert torch.equal(numbers(checkpoint, "e.up", step), weight.float() * grid)


def test_small_stacked_experts(tmp_path: Path) -> None:
    weight, scale = fp8(4, 6, 5), torch.rand(4, 1, 1)
    checkpoint = make(tmp_path, {"e.up": weight, "e.up_scale_inv": scale}, BLOCKS)
    assert torch.equal(numbers(checkpoint, "e.up", 5), weight.float() * scale)


def test_scales_of_activations_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    tensors = {"l.weight": fp8(4, 4), "l.weight_scale": torch.ones(1), "l.input_scale": torch.ones(1)}
    tensors |= {"attn.k_scale": torch.ones(1), "attn.v_scale": torch.ones(1)}
    checkpoint = make(tmp_path, tensors, COMPRESSED)
    assert list(checkpoint.tensors) == ["l.weight"]
    assert checkpoint.notes[0] == "FP8: 1 weight read with scales"
    assert any("left out 1 input_scale of activations: l.input_scale" in note for note in checkpoint.notes)
    assert any("k_scale" in note for note in checkpoint.notes)


def test_fp8_values_without_any_quantisation_are_plain_numbers(tmp_path: Path) -> None:
    weight = fp8(3, 4)
    checkpoint = make(tmp_path, {"l.weight": weight})
    assert isinstance(checkpoint.tensors["l.weight"], Stored)
    assert torch.equal(numbers(checkpoint, "l.weight", 5), weight.float())


def test_scales_may_lie_in_another_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCKS}))
    save_file({"l.weight": fp8(4, 4)}, str(tmp_path / "model-00001-of-00002.safetensors"))
    save_file({"l.weight_scale_inv": torch.ones(1, 1)}, str(tmp_path / "model-00002-of-00002.safetensors"))
    checkpoint = open_checkpoint(ModelRef("m", str(tmp_path)))
    weight = checkpoint.tensors["l.weight"]
    assert isinstance(weight, Derived)
    scale = weight.inputs[1]
    assert os.path.basename(scale.file) == "model-00002-of-00002.safetensors"


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, {"l.weight": fp8(4, 4)}, BLOCKS)
    assert "l.weight: FP8 without its scales: expected l.weight_scale_inv or l.weight_scale" in message
    some_have = {"l.weight": fp8(4, 4), "l.weight_scale": torch.ones(1), "m.weight": fp8(4, 4)}
    assert "m.weight: FP8 without its scales" in refused(tmp_path, some_have)


@pytest.mark.parametrize(
    ("name", "shape", "quantization", "phrase"),
    [
        ("l.weight_scale_inv", (2, 1), BLOCKS, "[2, 1] scales do not fit l.weight [256, 256]; expected [2, 2]"),
        ("l.weight_scale_inv", (1,), BLOCKS, "expected [2, 2] for blocks of [128, 128]"),
        ("l.weight_scale_inv", (256, 1), BLOCKS, "expected [2, 2]"),
        ("l.weight_scale", (7,), COMPRESSED, "or one scale, or one a row"),
        ("l.weight_scale", (256, 256, 1), COMPRESSED, "do not fit"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], quantization: dict[str, Any], phrase: str
) -> None:
    assert phrase in refused(tmp_path, {"l.weight": fp8(256, 256), name: torch.ones(shape)}, quantization)


@pytest.mark.parametrize(
    ("extra", "phrase"),
    [
        ({"l.scale": torch.ones(1)}, "FP8 with l.scale, which is not supported"),
        ({"l.scale_weight": torch.ones(1)}, "FP8 with l.scale_weight"),
        ({"l.weight_scale": torch.ones(1), "l.weight_zero_point": torch.ones(1)}, "FP8 with l.weight_zero_point"),
        ({"l.weight_scale": torch.ones(1), "l.weight_scale_inv": torch.ones(1)}, "has two scales"),
        ({"l.weight_scale": torch.ones(1, dtype=torch.uint8)}, "scales of dtype U8; expected F32, BF16 or F16"),
    ],
)
def test_scales_that_are_not_understood_are_refused(
    tmp_path: Path, extra: dict[str, torch.Tensor], phrase: str
) -> None:
    assert phrase in refused(tmp_path, {"l.weight": fp8(4, 4)} | extra)


@pytest.mark.parametrize(
    ("quantization", "phrase"),
    [
        ({"quant_method": "quip"}, "quantised by quip are not read (weights are stored rotated)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by modelopt are not read"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "stored rotated"),
    ],
)
def test_other_quantisation_is_refused(tmp_path: Path, quantization: dict[str, Any], phrase: str) -> None:
    message = refused(tmp_path, {"l.weight": torch.ones(2)}, quantization)
    assert phrase in message
    assert "Dequantise the model first" in message


def test_a_scale_whose_weight_is_not_fp8_is_refused(tmp_path: Path) -> None:
    tensors = {"l.weight": torch.ones(2, 2, dtype=torch.int8), "l.weight_scale": torch.ones(1)}
    assert "l.weight_scale: is a scale, but l.weight is I8, expected FP8" in refused(tmp_path, tensors, BLOCKS)
