"""Stored numbers -> float32, exactly; and the scales of FP8 weights, multiplied in float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from merge.arrays import F32


def fp8_table(exponent_bits: int, has_infinity: bool) -> F32:
    """(256,) float32: the value of each code of an 8-bit float with 7 - exponent_bits bits of mantissa.

    With infinity (E5M2) the highest exponent means infinity and NaN, as in IEEE 754; without (E4M3FN) only the codes
    0x7f and 0xff are NaN, and the highest exponent is one more binade of numbers.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433), table 1.
    """
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 1
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & top
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, np.maximum(exponent, 1) - bias)
    )
    if has_infinity:
        magnitude[exponent == top] = np.where(mantissa[exponent == top] == 0, np.inf, np.nan)
    else:
        magnitude[(codes & 0x7F) == 0x7F] = np.nan
    table: F32 = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return table


_TABLES = {"F8_E4M3": fp8_table(4, has_infinity=False), "F8_E5M2": fp8_table(5, has_infinity=True)}
_CHUNK = 65536  # elements: numpy makes 8-byte indices of the codes


def to_float32(dtype: str, raw: npt.NDArray[np.generic], out: F32) -> None:
    """raw (n,), storage dtype of `dtype` -> out (n,) float32, contiguous. Every value is exact; NaN stays NaN.

    Raises:
        ValueError: a dtype that float32 does not hold exactly (F64, integers).
    """
    if raw.shape != out.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out: expected contiguous float32 {raw.shape}, found {out.dtype} {out.shape}")
    if dtype == "F32":
        out[:] = raw.view(np.float32)
    elif dtype == "F16":
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            out[:] = raw.view(np.float16)
    elif dtype == "BF16":
        np.left_shift(raw.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    elif dtype in _TABLES:
        codes = raw.view(np.uint8)
        for place in range(0, len(codes), _CHUNK):
            part = slice(place, place + _CHUNK)
            np.take(_TABLES[dtype], codes[part], out=out[part], mode="clip")
    else:
        raise ValueError(f"{dtype} is not held exactly by float32; read its own values instead")


def apply_scales(
    values: F32,
    start: int,
    columns: int,
    block: tuple[int, int],
    scales: F32,
    by: np.ufunc = np.multiply,
) -> None:
    """Multiply, in place, elements start.. of a flattened (rows, columns) weight with the scales of their blocks.

    Args:
        values: (n,) float32, contiguous; any n and start, but whole rows are fastest.
        start: index of values[0] in the flattened weight.
        columns: length of a row.
        block: (rows, columns) that one scale covers.
        scales: (ceil(rows / block rows), ceil(columns / block columns)) float32.
        by: what is done with them instead, for example np.subtract.
    """
    row, column = divmod(start, columns)
    head = min((columns - column) % columns, len(values))
    n_rows = (len(values) - head) // columns
    body = head + n_rows * columns
    with np.errstate(over="ignore", invalid="ignore"):  # counted later, with all non-finite values
        if head:
            by(values[:head], np.repeat(scales[row // block[0]], block[1])[column : column + head], out=values[:head])
            row += 1
        if n_rows:
            _scale_rows(values[head:body].reshape(n_rows, columns), row, block, scales, by)
        if body < len(values):
            tail = np.repeat(scales[(row + n_rows) // block[0]], block[1])[: len(values) - body]
            by(values[body:], tail, out=values[body:])


def _scale_rows(values: F32, row: int, block: tuple[int, int], scales: F32, by: np.ufunc) -> None:
    """values (n, columns), the rows from `row` on"""
    n_rows, columns = values.shape
    mine = scales[np.arange(row, row + n_rows) // block[0]]  # (n, blocks in a row)
    whole = columns // block[1]
    step = values.itemsize
    blocks = np.lib.stride_tricks.as_strided(values, (n_rows, whole, block[1]), (columns * step, block[1] * step, step))
    by(blocks, mine[:, :whole, None], out=blocks)
    if whole * block[1] < columns:  # the last block of a row is cut off
        rest = values[:, whole * block[1] :]
        by(rest, mine[:, whole:], out=rest)
