"""The element types of checkpoints, under their safetensors names, and what recipes and torch call them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """`name`: as in a safetensors header; `torch_name`: attribute of torch; `numpy_name`: storage type in numpy."""

    name: str
    itemsize: int  # bytes
    is_float: bool
    torch_name: str
    numpy_name: str  # bf16 and fp8 are held as unsigned integers of their width
    max_finite: float | None = None


_ALL = (
    DType("F64", 8, True, "float64", "float64", 1.7976931348623157e308),
    DType("F32", 4, True, "float32", "float32", 3.4028234663852886e38),
    DType("F16", 2, True, "float16", "float16", 65504.0),
    DType("BF16", 2, True, "bfloat16", "uint16", 3.3895313892515355e38),
    DType("F8_E4M3", 1, True, "float8_e4m3fn", "uint8", 448.0),
    DType("F8_E5M2", 1, True, "float8_e5m2", "uint8", 57344.0),
    DType("I64", 8, False, "int64", "int64"),
    DType("I32", 4, False, "int32", "int32"),
    DType("I16", 2, False, "int16", "int16"),
    DType("I8", 1, False, "int8", "int8"),
    DType("U64", 8, False, "uint64", "uint64"),
    DType("U32", 4, False, "uint32", "uint32"),
    DType("U16", 2, False, "uint16", "uint16"),
    DType("U8", 1, False, "uint8", "uint8"),
    DType("BOOL", 1, False, "bool", "bool"),
)
DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}

# What a recipe may write after `dtype:` and `out_dtype:`.
RECIPE_NAMES: dict[str, str] = {
    **{dtype.torch_name: dtype.name for dtype in _ALL if dtype.is_float},
    "bf16": "BF16",
    "fp16": "F16",
    "half": "F16",
    "fp32": "F32",
    "float": "F32",
    "double": "F64",
    "fp64": "F64",
    "float8_e4m3": "F8_E4M3",
}


def torch_name(name: str) -> str:
    """The name that config.json uses: "BF16" -> "bfloat16"."""
    return DTYPES[name].torch_name
