"""Matrices -> what loaders of quantised checkpoints read: one class a format, numpy only, some rows at a time.

int8   bitsandbytes LLM.int8: a scale for each row          (Dettmers et al., arXiv:2208.07339, section 2)
nf4    bitsandbytes NF4: a float32 scale for 64 numbers     (Dettmers et al., QLoRA, arXiv:2305.14314, section 3)
int4   compressed-tensors "pack-quantized": symmetric, a bfloat16 scale for a group of a row, 8 numbers in an int32
fp8    E4M3 with a float32 scale for each block of 128 x 128 (64 or 32 where that does not divide the matrices), as
       DeepSeek-V3 (arXiv:2412.19437, section 3.3)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from merge.arrays import F32
from merge.decode import to_float32
from merge.dtypes import DTYPES, RECIPE_NAMES
from merge.errors import UsageError
from merge.kernels.encode import encode
from merge.tools.formats import NF4

Array = npt.NDArray[Any]
Encoder = Callable[[F32], tuple[dict[str, Array], F32]]
ROWS = 128  # rows of a piece: whole blocks in every format
_LENGTHS = (128, 64, 32)
_TINY = np.float32(1e-30)  # the largest magnitude of zeros: a scale that divides
_CODES = np.array(NF4, np.float32)
_MIDDLES = ((_CODES[1:].astype(np.float64) + _CODES[:-1]) / 2).astype(np.float32)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a matrix: `suffix` goes after the module's name; `value` if it is known beforehand."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    value: Array | None = None


class Quantizer(Protocol):
    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        """What is stored of a matrix of this shape and torch dtype; the weight itself first."""

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        """values (rows, columns): ROWS rows or the last ones -> flat pieces by suffix, and what they mean, as values"""

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        """quantization_config of config.json; `kept`: linear layers that stay as they are."""


class Int8:
    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        row_major = np.zeros((), np.uint8)  # bitsandbytes' number for "row"
        return [
            Part("weight", "I8", shape),
            Part("SCB", "F32", shape[:1]),
            Part("weight_format", "U8", (), row_major),
        ]

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        largest = np.maximum(np.abs(values).max(axis=1, keepdims=True), _TINY)
        codes = np.rint(values * (np.float32(127) / largest)).astype(np.int8)
        return {"weight": codes.reshape(-1), "SCB": largest.reshape(-1)}, codes * (largest / np.float32(127))

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(kept),
        }


class Nf4:
    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        n = shape[0] * shape[1]
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape)}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return [
            Part("weight", "U8", (-(-n // 2), 1)),
            Part("weight.absmax", "F32", (-(-n // 64),)),
            Part("weight.quant_map", "F32", (16,), _CODES),
            Part("weight.quant_state.bitsandbytes__nf4", "U8", text.shape, text),
        ]

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        codes, scales = nf4_codes(values)
        flat = codes.reshape(-1)[: values.size + values.size % 2]
        stored = {"weight": (flat[::2] << 4) | flat[1::2], "weight.absmax": scales}
        return stored, nf4_values(codes, scales, values.shape)

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(kept),
        }


def nf4_codes(values: F32) -> tuple[npt.NDArray[np.uint8], F32]:
    """values -> codes (blocks, 64), the last block padded with zeros, and the scale of each block"""
    n = values.size
    padded = np.zeros(-(-n // 64) * 64, np.float32)
    padded[:n] = values.reshape(-1)
    blocks = padded.reshape(-1, 64)
    largest = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), _TINY)
    return np.searchsorted(_MIDDLES, blocks * (np.float32(1) / largest)).astype(np.uint8), largest.reshape(-1)


def nf4_values(codes: npt.NDArray[np.uint8], scales: F32, shape: tuple[int, ...]) -> F32:
    """The inverse of nf4_codes."""
    found: F32 = (_CODES[codes] * scales[:, None]).reshape(-1)[: math.prod(shape)].reshape(shape)
    return found


@dataclass(frozen=True)
class Int4:
    group: int

    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        rows, columns = shape
        return [
            Part("weight_packed", "I32", (rows, columns // 8)),
            Part("weight_scale", "BF16", (rows, columns // self.group)),
            Part("weight_shape", "I64", (2,), np.array(shape, np.int64)),
        ]

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        groups = values.reshape(-1, self.group)
        scales = np.maximum(np.abs(groups).max(axis=1) / np.float32(7.5), _TINY)
        stored = np.empty(scales.size, np.uint16)
        encode(scales, "BF16", stored)
        to_float32("BF16", stored, scales)  # weights are divided by the scale that the loader has
        codes = np.clip(np.rint(groups / scales[:, None]), -8, 7)
        meant = (codes.astype(np.float32) * scales[:, None]).reshape(values.shape)
        nibbles = (codes + 8).astype(np.uint32).reshape(-1, 8)
        packed = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        return {"weight_packed": packed.view(np.int32), "weight_scale": stored}, meant

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group}
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(kept),
        }


@dataclass(frozen=True)
class Fp8:
    block: int  # rows and columns of one scale: 128 is what kernels are made for; loaders want whole blocks

    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        grid = (shape[0] // self.block, shape[1] // self.block)
        return [Part("weight", "F8_E4M3", shape), Part("weight_scale_inv", "F32", grid)]

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        rows, columns = values.shape
        largest_finite = np.float32(DTYPES["F8_E4M3"].max_finite)
        blocks = values.reshape(rows // self.block, self.block, columns // self.block, self.block)
        scales = np.maximum(np.abs(blocks).max(axis=(1, 3), keepdims=True), _TINY) / largest_finite
        # Rounding may lift the largest beyond the format's end.
        scaled = np.clip(blocks / scales, -largest_finite, largest_finite).reshape(-1)
        codes = np.empty(scaled.size, np.uint8)
        encode(scaled, "F8_E4M3", codes)
        to_float32("F8_E4M3", codes, scaled)
        meant = (scaled.reshape(blocks.shape) * scales).reshape(rows, columns)
        return {"weight": codes, "weight_scale_inv": scales.reshape(-1)}, meant

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.block, self.block],
            "modules_to_not_convert": list(kept),
        }


@dataclass(frozen=True)
class Dequantized:
    """What the numbers of another format mean, stored in the matrix's own dtype: what a quantised model computes with.

    nested: the scales of NF4 are quantised too (QLoRA, section 3, "double quantization"), by bitsandbytes.
    """

    inner: Quantizer
    nested: bool = False

    def parts(self, shape: tuple[int, int], dtype: str) -> list[Part]:
        return [Part("weight", RECIPE_NAMES[dtype], shape)]

    def encode(self, values: F32) -> tuple[dict[str, Array], F32]:
        meant = self.inner.encode(values)[1]
        return {"weight": meant.reshape(-1)}, meant

    def encoder(self, pieces: Iterator[F32]) -> Encoder:
        """As Quantizer.encoder. Scales of the whole matrix are quantised together: a float32 for 64 numbers is held."""
        if not self.nested:
            return self.encode
        scales = _nested(np.concatenate([self.inner.encode(piece)[0]["weight.absmax"] for piece in pieces]))
        done = 0

        def encode(values: F32) -> tuple[dict[str, Array], F32]:
            nonlocal done
            n = -(-values.size // 64)
            meant = nf4_values(nf4_codes(values)[0], scales[done : done + n], values.shape)
            done += n
            return {"weight": meant.reshape(-1)}, meant

        return encode

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        return {}


def _nested(scales: F32) -> F32:
    """Scales that were quantised in blocks of 256 around their mean, and what they are then."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    given = torch.from_numpy(scales)
    mean = given.mean()
    found: F32 = (dequantize_blockwise(*quantize_blockwise(given - mean, blocksize=256)) + mean).numpy()
    return found


def make_quantizer(to: str, shapes: Mapping[str, tuple[int, int]]) -> Quantizer:
    """The quantizer for matrices of these shapes, by module.

    Raises:
        UsageError: int4 or fp8 of matrices that no size of group or block divides.
    """
    if to in ("int8", "nf4"):
        return Int8() if to == "int8" else Nf4()
    divided = {name: shape[1:] if to == "int4" else shape for name, shape in shapes.items()}
    for length in _LENGTHS:
        if all(n % length == 0 for sides in divided.values() for n in sides):
            return Int4(length) if to == "int4" else Fp8(length)
    odd = [name for name, sides in divided.items() if any(n % _LENGTHS[-1] for n in sides)]
    raise UsageError(
        f"--to {to}: scales are for 128, 64 or 32 numbers along a side, and {odd[0]} is {shapes[odd[0]]} "
        f"({len(odd)} layers are such). Leave them out with --exclude, or use --to nf4."
    )
