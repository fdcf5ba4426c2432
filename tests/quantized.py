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
