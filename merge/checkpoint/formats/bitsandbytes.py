"""bitsandbytes: NF4 and FP4, also with double quantisation, and INT8 (LLM.int8).

4 bits: W holds the packed codes, W.absmax the scales, W.quant_map the 16 numbers, and the bytes of
W.quant_state.bitsandbytes__nf4 (or __fp4) are a JSON text with shape, dtype and sizes of blocks. Where scales are
quantised too, W.nested_absmax and W.nested_quant_map are theirs. 8 bits: W is int8, and SCB beside it has each row's
largest magnitude, which 127 stands for.

Source: bitsandbytes, functional.py (QuantState.as_dict) and nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import math
from typing import Any

from merge.checkpoint.formats import Quantization, Tensors
from merge.checkpoint.parts import FLOATS, WeightParts, as_bytes, check_dtype, check_shape, check_sizes, small_text
from merge.dtypes import RECIPE_NAMES
from merge.errors import CheckpointError
from merge.jsontext import parse_json
from merge.plan import Derived, TensorRef
from merge.quoting import quoted
from merge.sources.integers import integers

NAME = "bitsandbytes"
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES, ".SCB", ".weight_format")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LARGEST = 127  # what a row's largest magnitude becomes


def recognises(quantization: Quantization | None, tensors: Tensors) -> bool:
    if quantization is not None:
        return quantization.get("quant_method") == "bitsandbytes" or (
            "quant_method" not in quantization
            and any(quantization.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
        )
    return any(name.endswith((*_STATES, ".SCB")) for name in tensors)


def sources(
    path: str, quantization: Quantization | None, tensors: Tensors
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    parts = WeightParts(NAME, path, tensors)
    for name, ref in tensors.items():
        if name.endswith(".weight") and ref.dtype == "I8":
            parts.put(ref, _int8(parts, ref))
        elif f"{name}.absmax" in tensors or any(f"{name}{state}" in tensors for state in _STATES):
            parts.put(ref, _four_bits(parts, ref))
        elif name.endswith(".weight") and ref.dtype == "U8":
            parts.take(ref, f"{name}.absmax")
    return parts.done(_PARTS)


def _int8(parts: WeightParts, ref: TensorRef) -> Derived:
    if len(ref.shape) != 2:
        raise CheckpointError(f"{ref.file}: {ref.name}: INT8 of shape {quoted(list(ref.shape))}, expected a matrix.")
    stem = ref.name.removesuffix("weight")
    scale = parts.take(ref, f"{stem}SCB")
    check_dtype(scale, ("F32",))
    check_shape(scale, ref.shape[:1], ref.name)
    layout = parts.find(f"{stem}weight_format")
    if layout is not None and any(small_text(layout)):
        raise CheckpointError(
            f"{layout.file}: {layout.name}: rows are in an order for one kind of GPU, which is not read; "
            "expected 0 (row after row). Save the model with a newer bitsandbytes, or name the original."
        )
    block = (1, max(ref.shape[1], 1))
    return integers(ref.name, "BF16", ref.shape, ref, scale, bits=8, block=block, divisor=_LARGEST)


def _four_bits(parts: WeightParts, ref: TensorRef) -> Derived:
    state_name = next((f"{ref.name}{state}" for state in _STATES if f"{ref.name}{state}" in parts.tensors), None)
    state_ref = parts.take(ref, state_name or f"{ref.name}{_STATES[0]}")
    state = _QuantState(state_ref)
    n = math.prod(state.shape)
    if ref.nbytes != -(-n // 2):
        raise CheckpointError(
            f"{ref.file}: {ref.name}: {ref.nbytes:,} bytes of codes; expected {-(-n // 2):,} for "
            f"{quoted(list(state.shape))}, which {state_ref.name} says. Download all files again."
        )
    table, absmax = parts.take(ref, f"{ref.name}.quant_map"), parts.take(ref, f"{ref.name}.absmax")
    check_dtype(table, ("F32",))
    check_shape(table, (16,), ref.name)
    blocks = -(-n // state.block)
    check_shape(absmax, (blocks,), ref.name)
    inputs = [as_bytes(ref), absmax, table]
    parameters: dict[str, Any] = {"block": state.block}
    if state.nested_block:
        nested, codes = (parts.take(ref, f"{ref.name}.nested_{part}") for part in ("absmax", "quant_map"))
        check_dtype(absmax, ("U8",))
        for part, size in ((nested, -(-blocks // state.nested_block)), (codes, 256)):
            check_dtype(part, ("F32",))
            check_shape(part, (size,), ref.name)
        inputs += [nested, codes]
        parameters |= {"nested_block": state.nested_block, "offset": state.offset}
    else:
        check_dtype(absmax, FLOATS)
    return Derived(ref.name, state.dtype, state.shape, "blockwise", tuple(inputs), parameters, how="decoded")


class _QuantState:
    """The text of a quant_state, checked. `nested_block` is 0 where scales are not quantised."""

    def __init__(self, ref: TensorRef) -> None:
        try:
            values = parse_json(small_text(ref))
        except ValueError as error:
            raise CheckpointError(f"{ref.file}: {ref.name}: {error}. Download the file again.") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{ref.file}: {ref.name}: is not a JSON object. Download the file again.")
        self._ref = ref
        self.shape = check_sizes(values.get("shape"), ref)
        self.block = self._block(values, "blocksize", _BLOCKS)
        dtype = values.get("dtype")
        self.dtype = RECIPE_NAMES.get(dtype, "") if isinstance(dtype, str) else ""
        if self.dtype not in FLOATS:
            raise self._wrong("dtype", dtype, "float32, float16 or bfloat16")
        self.nested_block, self.offset = 0, 0.0
        if "nested_blocksize" in values:
            self.nested_block = self._block(values, "nested_blocksize", range(1, 1 << 20))
            offset = values.get("nested_offset")
            if type(offset) is not float or not math.isfinite(offset):
                raise self._wrong("nested_offset", offset, "a finite number")
            self.offset = offset

    def _block(self, values: dict[str, Any], key: str, known: range | tuple[int, ...]) -> int:
        found = values.get(key)
        if type(found) is not int or found not in known:
            raise self._wrong(key, found, "a size of blocks that bitsandbytes has")
        return found

    def _wrong(self, key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._ref.file}: {self._ref.name}: {key}: expected {expected}, found {quoted(found)}. "
            "Download the file again."
        )
