"""gguf_rows: rows of a GGUF tensor, decoded as the gguf package defines it.

inputs: the bytes, as one vector. parameters: `kind`, the name of the type; `head`: rows of a head whose halves
llama.cpp has by turns, put back one after the other (0: rows stay as they are); `add`: to every entry (Gemma's norms).
"""

from __future__ import annotations

import math

import numpy as np

from merge.arrays import F32
from merge.plan import Derived, Stored
from merge.sources import Fill, Read

_DTYPES = {"F32": "F32", "F16": "F16"}  # of an output that keeps its input's dtype; of quantised ones bfloat16


def gguf_rows(
    name: str, shape: tuple[int, ...], path: str, offset: int, kind: str, head: int = 0, add: float = 0.0
) -> Derived:
    """A tensor whose first byte is at `offset` of the file. Raises ValueError if blocks do not divide its rows."""
    size = row_bytes(shape[-1], kind) * math.prod(shape[:-1])
    stored = Stored(name, "U8", (size,), path, offset)
    parameters = {"kind": kind, "head": head, "add": add}
    return Derived(name, _DTYPES.get(kind, "BF16"), shape, "gguf_rows", (stored,), parameters, how="decoded")


def row_bytes(length: int, kind: str) -> int:
    """Raises ValueError if blocks do not divide a row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if length % elements:
        raise ValueError(f"rows of {length} entries, which blocks of {elements} ({kind}) do not divide")
    return int(length // elements * size)


def prepare(ref: Derived, read: Read) -> Fill:
    from gguf import GGMLQuantizationType, quants

    (stored,) = ref.inputs
    kind, head, add = (ref.parameters[key] for key in ("kind", "head", "add"))
    is_vector = len(ref.shape) == 1
    length = 1 if is_vector and head else ref.shape[-1]
    width = row_bytes(ref.shape[-1], kind) // (ref.shape[-1] if is_vector and head else 1)
    n_rows = ref.size // length

    def fill(start: int, out: F32) -> None:
        if not len(out):
            return
        unit = head or 1
        first = start // length // unit * unit
        last = min(-(-(start + len(out)) // (length * unit)) * unit, n_rows)
        packed = np.empty((last - first) * width, np.uint8)
        read(stored, first * width, packed)
        rows = _decoded(packed.reshape(last - first, width), kind)
        if head:
            rows = rows.reshape(-1, head // 2, 2, length).swapaxes(1, 2).reshape(-1, length)
        begin = start - first * length
        out[:] = rows.reshape(-1)[begin : begin + len(out)]
        if add:
            out += np.float32(add)

    def _decoded(packed: np.ndarray, name: str) -> F32:
        if name == "F32":
            return packed.view(np.float32)
        if name == "F16":
            return packed.view(np.float16).astype(np.float32)
        with np.errstate(all="ignore"):  # of damaged scales; what is not finite is counted by the engine
            found: F32 = quants.dequantize(packed, GGMLQuantizationType[name])
        return found

    return fill


def held_bytes(ref: Derived) -> int:
    """A block as it is stored, decoded, and put in order; gguf-py goes over it in small pieces."""
    rows = max(1, (1 << 17) // ref.shape[-1] + 2 * ref.parameters["head"])
    return int(10 * rows * ref.shape[-1])
