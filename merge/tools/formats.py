"""Numbers in the formats of weights: their bits, the stored value, and the error.

    FP32 1+8+23   TF32 1+8+10   BF16 1+8+7   FP16 1+5+10   FP8 E4M3 1+4+3   FP8 E5M2 1+5+2
    INT8   round(127 x / absmax), from -127 to 127
    NF4    the nearest of 16 quantiles of a normal distribution, times absmax

Rounding is to nearest, ties to even, as IEEE 754 has it. E4M3 has no infinity: what is too large is NaN, though some
casts, torch's among them, store 448 instead (Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433,
section 3). NF4: Dettmers et al., QLoRA, arXiv:2305.14314, appendix E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """Sign, exponent and mantissa bits; `largest`: the largest finite value."""

    name: str
    exponent: int
    mantissa: int
    largest: float
    has_infinity: bool = True

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1


FLOATS = (
    FloatFormat("FP32", 8, 23, 3.4028234663852886e38),
    FloatFormat("TF32", 8, 10, 3.4011621342146535e38),
    FloatFormat("BF16", 8, 7, 3.3895313892515355e38),
    FloatFormat("FP16", 5, 10, 65504.0),
    FloatFormat("FP8 E4M3", 4, 3, 448.0, has_infinity=False),
    FloatFormat("FP8 E5M2", 5, 2, 57344.0),
)

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class InFormat:
    """One number in one format.

    Attributes:
        bits: sign, exponent and mantissa; an integer format has one field only.
        stored: the value that the bits mean.
        absolute, relative: error; relative is NaN for a number that is 0 or not finite.
    """

    format: str
    bits: tuple[str, ...]
    value: float
    stored: float

    @property
    def absolute(self) -> float:
        return abs(self.stored - self.value) if self.stored != self.value else 0.0

    @property
    def relative(self) -> float:
        if self.value == 0 or not math.isfinite(self.value):
            return math.nan
        return self.absolute / abs(self.value)


def in_all_formats(value: float, absmax: float) -> list[InFormat]:
    """value (any float64) in every format; absmax > 0: the largest magnitude that shares its INT8 or NF4 scale."""
    return [*(in_float(value, form) for form in FLOATS), in_int8(value, absmax), in_nf4(value, absmax)]


def in_float(value: float, form: FloatFormat) -> InFormat:
    sign = "1" if math.copysign(1.0, value) < 0 else "0"
    stored = round_to(value, form)
    return InFormat(form.name, (sign, *_fields(abs(stored), form)), value, stored)


def round_to(value: float, form: FloatFormat) -> float:
    """The nearest value of the format, ties to even, including subnormals. Exact for every float64."""
    if value == 0 or not math.isfinite(value):
        return value if form.has_infinity or math.isfinite(value) else math.nan
    _, exponent = math.frexp(abs(value))  # value = fraction * 2^exponent, 0.5 <= fraction < 1
    step = max(exponent - 1, 1 - form.bias) - form.mantissa
    rounded = math.ldexp(round(math.ldexp(abs(value), -step)), step)  # Python rounds halves to even
    if rounded > form.largest:
        rounded = math.inf if form.has_infinity else math.nan
    return math.copysign(rounded, value)


def _fields(magnitude: float, form: FloatFormat) -> tuple[str, str]:
    """Exponent and mantissa as binary digits, of a magnitude that the format holds."""
    top = (1 << form.exponent) - 1
    if math.isnan(magnitude):
        exponent, mantissa = top, (1 << form.mantissa) - 1 if not form.has_infinity else 1 << form.mantissa - 1
    elif math.isinf(magnitude):
        exponent, mantissa = top, 0
    else:
        _, power = math.frexp(magnitude)
        power = max(power - 1, 1 - form.bias)
        steps = int(math.ldexp(magnitude, form.mantissa - power))
        is_normal = steps >> form.mantissa
        exponent = power + form.bias if is_normal else 0
        mantissa = steps - (is_normal << form.mantissa)
    return f"{exponent:0{form.exponent}b}", f"{mantissa:0{form.mantissa}b}"


def in_int8(value: float, absmax: float) -> InFormat:
    """Symmetric, with scale absmax / 127; values beyond absmax are stored as absmax."""
    if math.isnan(value):
        return InFormat("INT8", ("-" * 8,), value, math.nan)
    code = round(max(-1.0, min(1.0, value / absmax)) * 127)
    return InFormat("INT8", (f"{code & 0xFF:08b}",), value, code * absmax / 127)


def in_nf4(value: float, absmax: float) -> InFormat:
    if math.isnan(value):
        return InFormat("NF4", ("-" * 4,), value, math.nan)
    scaled = max(-1.0, min(1.0, value / absmax))
    code = min(range(16), key=lambda i: abs(NF4[i] - scaled))
    return InFormat("NF4", (f"{code:04b}",), value, NF4[code] * absmax)
