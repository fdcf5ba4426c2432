"""Scalar building blocks of all kernels: reading a stored number as float32, and looking at its bits.

They are intrinsics because numba widens integer shifts to 64 bits, which halves what LLVM packs into a vector register.
Kernels read `as_f32(raw[m, i])`, where raw holds bfloat16 as uint16, or float32; the same source serves both.
"""

# Intrinsics are declared by functions without a body; see _instruction.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import inspect
import platform
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

import merge.without_scipy  # noqa: F401  # before the first kernel is loaded

_I16, _I32, _I64, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

# Every processor but those of x86 from before 2013
_HAS_FMA = platform.machine().lower() not in ("x86_64", "amd64", "i686") or llvm.get_host_cpu_features().get(
    "fma", False
)

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")
Number = np.uint16 | np.float32  # as it is stored
Int = int | np.int64
Truth = bool | np.bool_
Count = int | np.uint32  # the result of a kernel is an int where Python calls it


def kernel(function: F) -> F:
    """Compiles a function on its first call, and keeps the code on the disk.

    Strict IEEE arithmetic: no contraction or reordering, so that bytes are the same on every machine.
    """
    return _compiled(function)


def part(function: F) -> F:
    """The same for a function of one element, which becomes part of the loops that call it, however long it is."""
    return _compiled(function, forceinline=True)


def _compiled(function: F, **more: bool) -> F:
    options: dict[str, Any] = more | {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it: a read-only installation, and no home directory
        compiled = numba.njit(**options)(function)
    return typing.cast(F, compiled)


def _instruction(
    types_of: Signature | Callable[..., Signature | None], build: Callable[..., ir.Value]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes an intrinsic of the function below it, which only declares it.

    Args:
        types_of: numba's types; or, of the arguments' types, None for those that it does not take.
        build: (builder, *values) -> the result, in LLVM's instructions.
    """

    def lower(context: object, builder: ir.IRBuilder, types_: Signature, values: Sequence[ir.Value]) -> ir.Value:
        return build(builder, *values)

    def declared(function: Callable[P, T]) -> Callable[P, T]:
        def typed(context: object, *arguments: types.Type) -> tuple[Signature, Callable[..., ir.Value]] | None:
            found = types_of if isinstance(types_of, Signature) else types_of(*arguments)
            return None if found is None else (found, lower)

        typed.__name__, typed.__doc__ = function.__name__, function.__doc__
        parameters = list(inspect.signature(typed).parameters.values())[:1]
        parameters += inspect.signature(function).parameters.values()
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # numba reads it
        return typing.cast(Callable[P, T], intrinsic(typed))

    return declared


def _is_stored(value: types.Type) -> Signature | None:
    return types.float32(value) if value in (types.uint16, types.float32) else None


def _widened(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if value.type == _F32:
        return value
    return builder.bitcast(builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16)), _F32)


@_instruction(_is_stored, _widened)
def as_f32(value: Number) -> np.float32:
    """bfloat16 held as uint16, or float32 -> float32; exact"""


def _masked(mask: int) -> Callable[..., ir.Value]:
    return lambda builder, value: builder.and_(builder.bitcast(value, _I32), ir.Constant(_I32, mask))


@_instruction(types.uint32(types.float32), _masked(0x7FFFFFFF))
def magnitude_bits(value: np.float32) -> np.uint32:
    """The bits without the sign. Ordered like |value|; above 0x7f800000: NaN."""


@_instruction(types.uint32(types.float32), _masked(0x80000000))
def sign_bits(value: np.float32) -> np.uint32:
    """0x80000000 for negative numbers, else 0"""


@_instruction(
    types.float32(types.float32), lambda builder, value: builder.bitcast(_masked(0x7F800000)(builder, value), _F32)
)
def binade(value: np.float32) -> np.float32:
    """The largest power of two that is not above the magnitude; 0 for zero and subnormal numbers"""


def _narrowed(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, ir.Constant(_I16, 0x7FC0), builder.trunc(rounded, _I16))


@_instruction(types.uint16(types.float32), _narrowed)
def to_bf16(value: np.float32) -> np.uint16:
    """float32 -> bfloat16 as uint16, to nearest even; NaN -> 0x7fc0"""


def _mixed(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = builder.xor(x, builder.lshr(x, ir.Constant(_I32, shift)))
        x = builder.mul(x, ir.Constant(_I32, factor))
    return builder.xor(x, builder.lshr(x, ir.Constant(_I32, 15)))


@_instruction(types.uint32(types.uint32), _mixed)
def mix32(value: np.uint32) -> np.uint32:
    """A bijection with avalanche. Source: Wellons, "hash-prospector" (public domain), lowbias32"""


@_instruction(
    types.uint32(types.int64, types.uint32),
    lambda builder, index, key: builder.add(
        builder.mul(builder.trunc(index, _I32), ir.Constant(_I32, 0x9E3779B1)), key
    ),
)
def counter32(index: Int, key: np.uint32) -> np.uint32:
    """Golden-ratio step of the low half of an element's index, plus the key, modulo 2^32"""


@_instruction(types.uint32(types.uint32, types.uint32), lambda builder, a, b: builder.add(a, b))
def add32(a: np.uint32, b: np.uint32) -> np.uint32:
    """a + b modulo 2^32"""


@_instruction(types.uint32(types.uint32, types.uint32), lambda builder, a, b: builder.sub(a, b))
def sub32(a: np.uint32, b: np.uint32) -> np.uint32:
    """a - b modulo 2^32"""


@_instruction(
    lambda count, condition: types.uint32(types.uint32, condition) if isinstance(condition, types.Boolean) else None,
    lambda builder, count, condition: builder.add(count, builder.zext(condition, _I32)),
)
def count32(count: np.uint32, condition: Truth) -> np.uint32:
    """One more where the condition holds: a counter as wide as a float32, so that both fill one register"""


def _power(builder: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    biased = builder.add(builder.trunc(exponent, _I32), ir.Constant(_I32, 127))
    return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)


@_instruction(types.float32(types.int64), _power)
def power_of_two(exponent: Int) -> np.float32:
    """2^exponent, from -126 to 127"""


def _power_f64(builder: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    biased = builder.add(builder.sext(exponent, _I64), ir.Constant(_I64, 1023))
    return builder.bitcast(builder.shl(biased, ir.Constant(_I64, 52)), _F64)


@_instruction(types.float64(types.int32), _power_f64)
def power_of_two_f64(exponent: np.int32) -> np.float64:
    """2^exponent, from -1022 to 1023"""


def _is_choice(condition: types.Type, one: types.Type, other: types.Type) -> Signature | None:
    return one(condition, one, other) if isinstance(condition, types.Boolean) and one == other else None


@_instruction(_is_choice, lambda builder, condition, one, other: builder.select(condition, one, other))
def where(condition: Truth, one: T, other: T) -> T:
    """`one if condition else other`, both computed: an instruction where Python's form is a branch.

    LLVM turns small branches into this instruction by itself, but not all, and under AVX2, which has few masked
    instructions, a loop with a branch that is left is not put into vector registers.
    """


def _divided(builder: ir.IRBuilder, number: ir.Value, divisor: ir.Value, inverse: ir.Value) -> ir.Value:
    if not _HAS_FMA:
        return builder.fdiv(number, divisor)
    found = builder.fmul(number, inverse)
    for _ in range(2):
        remainder = builder.fma(builder.fneg(divisor), found, number)
        found = builder.fma(remainder, inverse, found)
    return found


@_instruction(types.float64(types.float64, types.float64, types.float64), _divided)
def quotient(number: float, divisor: float, inverse: float) -> np.float64:
    """number / divisor in float64, inverse being 1 / divisor: IEEE's quotient but for the sign of zero, in less time

    Not for quotients below 2^-900 or infinity. Source: Markstein 1990, "Computation of elementary functions on the IBM
    RISC System/6000 processor": a quotient that is one of the two nearest numbers becomes the nearest by its remainder,
    which a fused product and sum gives exactly; the first such step makes it one of the two.
    """


def _split(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    size = builder.call(builder.module.declare_intrinsic("llvm.fabs", [_F64]), [value])
    tiny = builder.fcmp_ordered("<", size, ir.Constant(_F64, 2.0**-1022))
    scaled = builder.select(tiny, builder.fmul(value, ir.Constant(_F64, 2.0**54)), value)
    bits = builder.bitcast(scaled, _I64)
    high = builder.trunc(builder.lshr(bits, ir.Constant(_I64, 32)), _I32)
    field = builder.and_(builder.lshr(high, ir.Constant(_I32, 20)), ir.Constant(_I32, 0x7FF))
    less = builder.select(tiny, ir.Constant(_I32, 1022 + 54), ir.Constant(_I32, 1022))
    exponent = builder.sitofp(builder.sub(field, less), _F64)
    rest = builder.and_(bits, ir.Constant(_I64, 0x800FFFFFFFFFFFFF))
    mantissa = builder.bitcast(builder.or_(rest, ir.Constant(_I64, 1022 << 52)), _F64)
    special = builder.or_(
        builder.icmp_unsigned("==", field, ir.Constant(_I32, 0x7FF)),
        builder.fcmp_ordered("==", value, ir.Constant(_F64, 0.0)),
    )
    both = builder.select(special, value, mantissa), builder.select(special, ir.Constant(_F64, 0.0), exponent)
    return cgutils.pack_array(builder, both)


@_instruction(numba.typeof((0.0, 0.0))(types.float64), _split)
def frexp(value: float) -> tuple[np.float64, np.float64]:
    """(m, e) with value = m 2^e and 0.5 <= |m| < 1; (value, 0) of 0, infinity and NaN

    As the C library's, of which LLVM makes no vectors.
    """
