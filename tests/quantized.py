"""Small quantised models: how each format stores a matrix, and what it means by the format's own definition.

Packing here is one value at a time, by the descriptions of the formats; it shares nothing with merge/unpack.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.recipe.model import ModelRef

Tensors = dict[str, torch.Tensor]
Array = npt.NDArray[Any]


def make(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))
    return open_checkpoint(ModelRef("m", str(folder)))


def numbers(checkpoint: Checkpoint, name: str, step: int = 0) -> npt.NDArray[np.float32]:
    """All of a tensor, in float32, read in pieces of `step` elements."""
    ref = checkpoint.tensors[name]
    out = np.empty(ref.size, np.float32)
    with SourceReader(checkpoint.files) as reader:
        for start in range(0, ref.size, step or ref.size):
            reader.read_values(ref, start, out[start : start + (step or ref.size)])
    return out.reshape(ref.shape)


def stream(codes: Sequence[int], bits: int, word: int = 32) -> list[int]:
    """Codes one after another from the lowest bit on, as words."""
    whole = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    return [(whole >> (word * i)) & ((1 << word) - 1) for i in range(-(-len(codes) * bits // word))]


def words(codes: Array, bits: int, axis: int) -> torch.Tensor:
    """codes (rows, columns) -> int32, packed along an axis"""
    packed = [stream(line, bits) for line in (codes if axis == 1 else codes.T)]
    found = np.array(packed, np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(found if axis == 1 else found.T))


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bitsandbytes_4bit(rows: int, columns: int, kind: str, nested: bool, dtype: str) -> tuple[Tensors, Array]:
    """The tensors of "l.weight", as bitsandbytes writes them, and what it makes of them."""
    from bitsandbytes import functional

    weight = torch.from_numpy(random(1).standard_normal((rows, columns), np.float32)).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    parts = {f"l.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    if weight.numel() % 64 == 0:
        # Rows of one block each: on CPU, bitsandbytes 0.50.2 takes wrong scales where blocks do not divide the rows.
        state.shape = torch.Size((weight.numel() // 64, 64))
    meant = functional.dequantize_4bit(codes, state).reshape(rows, columns)
    return {"l.weight": codes} | parts, meant.float().numpy()


def compressed(
    rows: int, columns: int, kind: str, seed: int = 0, **weights: Any
) -> tuple[Tensors, dict[str, Any], torch.Tensor]:
    """Tensors and config of "l.weight" as compressed-tensors writes them, and what it makes of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    arguments = scheme.weights
    weight = torch.from_numpy(random(seed).standard_normal((rows, columns), np.float32)).to(torch.bfloat16)
    width = columns // arguments.group_size if arguments.group_size else 1
    grid = (rows, width) if weights["strategy"] != "tensor" else (1,)
    groups = weight.float().reshape(rows, width, -1)
    largest = groups.abs().amax(-1) if len(grid) == 2 else weight.float().abs().max()[None]
    state: Tensors = {"weight": weight}
    if kind.startswith("nvfp4"):
        overall = torch.tensor([448 * 6 / float(weight.abs().max())], dtype=torch.float32)
        state["weight_global_scale"] = overall
        state["weight_scale"] = (largest / 6 * overall).to(torch.float8_e4m3fn).float()
    elif kind.startswith("mxfp4"):
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    else:
        state["weight_scale"] = (largest / (2 ** (arguments.num_bits - 1) - 0.5)).to(torch.bfloat16)
        if not arguments.symmetric:
            most = 2 ** (arguments.num_bits - 1)
            state["weight_zero_point"] = torch.from_numpy(random(3).integers(-most, most, grid)).to(torch.int8)
    compressor: Any = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    meant = compressor.decompress(dict(stored), scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}
    return {f"l.{name}": part.contiguous() for name, part in stored.items()}, config, meant


def without(name: str) -> Callable[[Tensors], None]:
    """A change: a tensor is missing."""
    return lambda tensors: tensors.__delitem__(name)


def holds(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    """A change: a tensor is another."""
    return lambda tensors: tensors.__setitem__(name, value)


def gptq(
    rows: int, columns: int, bits: int, group: int, *, version: int = 1, act_order: bool = False, smallest: int = 1
) -> tuple[Tensors, Array]:
    """Tensors of module "l" (rows outputs, columns inputs), and its weight by the definition, in float64."""
    dice = random(bits)
    groups = columns // group
    codes = dice.integers(0, 1 << bits, (columns, rows))
    zeros = dice.integers(smallest, 1 << bits, (groups, rows))
    scales = torch.from_numpy(dice.uniform(0.001, 0.1, (groups, rows))).half()
    index = np.arange(columns) // group
    if act_order:
        dice.shuffle(index)
    stored = zeros - 1 if version == 1 else zeros
    tensors = {
        "l.qweight": words(codes, bits, axis=0),
        "l.qzeros": words(stored, bits, axis=1),
        "l.scales": scales,
        "l.g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, ((codes - zeros[index]) * scales.double().numpy()[index]).T


def awq(rows: int, columns: int, group: int) -> tuple[Tensors, Array]:
    """Tensors of module "l" (rows outputs, columns inputs), and its weight by the definition, in float64."""
    dice = random(5)
    codes, zeros = dice.integers(0, 16, (columns, rows)), dice.integers(0, 16, (columns // group, rows))
    scales = torch.from_numpy(dice.uniform(0.001, 0.1, (columns // group, rows))).half()
    order = [8 * word + place for word in range(rows // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {
        "l.qweight": words(codes[:, order], 4, axis=1),
        "l.qzeros": words(zeros[:, order], 4, axis=1),
        "l.scales": scales,
    }
    index = np.arange(columns) // group
    return tensors, ((codes - zeros[index]) * scales.double().numpy()[index]).T


def mxfp4(experts: int, columns: int, groups: int) -> Tensors:
    """Tensors of "e.up", which has the shape (experts, groups * 32, columns)."""
    dice = random(6)
    blocks = dice.integers(0, 256, (experts, columns, groups, 16)).astype(np.uint8)
    scales = dice.integers(110, 130, (experts, columns, groups)).astype(np.uint8)
    return {"e.up_blocks": torch.from_numpy(blocks), "e.up_scales": torch.from_numpy(scales)}
