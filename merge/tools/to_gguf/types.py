"""Types of a GGUF file: what each tensor is stored as, and the encoding of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# --to -> (type of matrices, type of the embedding and the head)
TYPES = {
    "f32": ("F32", "F32"),
    "f16": ("F16", "F16"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q5_1": ("Q5_1", "Q8_0"),
    "q5_0": ("Q5_0", "Q8_0"),
    "q4_1": ("Q4_1", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
}
_OUTER = ("token_embd.weight", "output.weight")
_KEPT = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # routers


def type_of(name: str, shape: tuple[int, ...], to: str) -> GGMLQuantizationType:
    """Norms, biases and routers are float32, as llama.cpp has them; rows that blocks do not divide are float16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name.endswith(_KEPT):
        return GGMLQuantizationType.F32
    found = GGMLQuantizationType[TYPES[to][name in _OUTER]]
    return found if shape[-1] % GGML_QUANT_SIZES[found][0] == 0 else GGMLQuantizationType.F16


def file_type(to: str) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if to == "f32" else f"MOSTLY_{TYPES[to][0]}"])


def encode_rows(values: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """values (rows, length) -> their bytes, as gguf-py quantises"""
    from gguf import GGMLQuantizationType, quants

    if kind == GGMLQuantizationType.F32:
        return values
    if kind == GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):  # counted by the caller
            return values.astype(np.float16)
    found: npt.NDArray[Any] = quants.quantize(values, kind)
    return found
