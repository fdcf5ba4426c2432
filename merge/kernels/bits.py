"""Scalar building blocks of all kernels: reading a stored number as float32, and looking at its bits.

They are intrinsics because numba widens integer shifts to 64 bits, which halves what LLVM packs into a vector register.
Kernels read `as_f32(raw[m, i])`, where raw holds bfloat16 as uint16, or float32; the same source serves both.
"""

from __future__ import annotations

import platform
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_I16, _I32, _I64, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

# Every processor but those of x86 from before 2013
_HAS_FMA = platform.machine().lower() not in ("x86_64", "amd64", "i686") or llvm.get_host_cpu_features().get(
    "fma", False
)

F = TypeVar("F", bound=Callable[..., Any])


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


@intrinsic  # type: ignore[untyped-decorator]
def as_f32(typing_context: Any, value: Any) -> Any:
    """bfloat16 held as uint16, or float32 -> float32; exact"""
    if value == types.uint16:

        def widen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            wide = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
            return builder.bitcast(wide, _F32)

        return types.float32(types.uint16), widen
    if value == types.float32:
        return types.float32(types.float32), lambda context, builder, signature, args: args[0]
    return None


@intrinsic  # type: ignore[untyped-decorator]
def magnitude_bits(typing_context: Any, value: Any) -> Any:
    """float32 -> uint32: the bits without the sign. Ordered like |value|; above 0x7f800000: NaN."""

    def mask(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], _I32), ir.Constant(_I32, 0x7FFFFFFF))

    return types.uint32(types.float32), mask


@intrinsic  # type: ignore[untyped-decorator]
def sign_bits(typing_context: Any, value: Any) -> Any:
    """float32 -> uint32: 0x80000000 for negative numbers, else 0"""

    def mask(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], _I32), ir.Constant(_I32, 0x80000000))

    return types.uint32(types.float32), mask


@intrinsic  # type: ignore[untyped-decorator]
def to_bf16(typing_context: Any, value: Any) -> Any:
    """float32 -> bfloat16 as uint16, to nearest even; NaN -> 0x7fc0"""

    def narrow(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(is_nan, ir.Constant(_I16, 0x7FC0), builder.trunc(rounded, _I16))

    return types.uint16(types.float32), narrow


@intrinsic  # type: ignore[untyped-decorator]
def mix32(typing_context: Any, value: Any) -> Any:
    """uint32 -> uint32, a bijection with avalanche. Source: Wellons, "hash-prospector" (public domain), lowbias32"""

    def mix(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = builder.xor(x, builder.lshr(x, ir.Constant(_I32, shift)))
            x = builder.mul(x, ir.Constant(_I32, factor))
        return builder.xor(x, builder.lshr(x, ir.Constant(_I32, 15)))

    return types.uint32(types.uint32), mix


@intrinsic  # type: ignore[untyped-decorator]
def counter32(typing_context: Any, index: Any, key: Any) -> Any:
    """int64 element index, uint32 key -> uint32: golden-ratio step of the index's low half, plus the key, mod 2^32"""

    def step(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.trunc(args[0], _I32)
        return builder.add(builder.mul(low, ir.Constant(_I32, 0x9E3779B1)), args[1])

    return types.uint32(types.int64, types.uint32), step


@intrinsic  # type: ignore[untyped-decorator]
def add32(typing_context: Any, a: Any, b: Any) -> Any:
    """uint32 + uint32 modulo 2^32"""
    return types.uint32(types.uint32, types.uint32), lambda context, builder, signature, args: builder.add(*args)


@intrinsic  # type: ignore[untyped-decorator]
def sub32(typing_context: Any, a: Any, b: Any) -> Any:
    """uint32 - uint32 modulo 2^32"""
    return types.uint32(types.uint32, types.uint32), lambda context, builder, signature, args: builder.sub(*args)


@intrinsic  # type: ignore[untyped-decorator]
def count32(typing_context: Any, count: Any, condition: Any) -> Any:
    """uint32, one more where the condition holds: a counter as wide as a float32, so that both fill one register"""
    if not isinstance(condition, types.Boolean):
        return None

    def add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(args[0], builder.zext(args[1], _I32))

    return types.uint32(types.uint32, condition), add


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """int64 from -126 to 127 -> 2^exponent as float32"""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.trunc(args[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two_f64(typing_context: Any, exponent: Any) -> Any:
    """int32 from -1022 to 1023 -> 2^exponent as float64"""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.sext(args[0], _I64), ir.Constant(_I64, 1023))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I64, 52)), _F64)

    return types.float64(types.int32), build


@intrinsic  # type: ignore[untyped-decorator]
def where(typing_context: Any, condition: Any, one: Any, other: Any) -> Any:
    """`one if condition else other`, both computed: an instruction where Python's form is a branch.

    LLVM turns small branches into this instruction by itself, but not all, and under AVX2, which has few masked
    instructions, a loop with a branch that is left is not put into vector registers.
    """
    if not isinstance(condition, types.Boolean) or one != other:
        return None

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return one(condition, one, other), build


@intrinsic  # type: ignore[untyped-decorator]
def quotient(typing_context: Any, number: Any, divisor: Any, inverse: Any) -> Any:
    """number / divisor in float64, inverse being 1 / divisor: IEEE's quotient but for the sign of zero, in less time

    Not for quotients below 2^-900 or infinity. Source: Markstein 1990, "Computation of elementary functions on the IBM
    RISC System/6000 processor": a quotient that is one of the two nearest numbers becomes the nearest by its remainder,
    which a fused product and sum gives exactly; the first such step makes it one of the two.
    """

    def divide(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, divisor, inverse = args
        if not _HAS_FMA:
            return builder.fdiv(number, divisor)
        found = builder.fmul(number, inverse)
        for _ in range(2):
            remainder = builder.fma(builder.fneg(divisor), found, number)
            found = builder.fma(remainder, inverse, found)
        return found

    return types.float64(types.float64, types.float64, types.float64), divide


@intrinsic  # type: ignore[untyped-decorator]
def frexp(typing_context: Any, value: Any) -> Any:
    """float64 -> (m, e) with value = m 2^e and 0.5 <= |m| < 1, e as float64; (value, 0) of 0, infinity and NaN

    As the C library's, of which LLVM makes no vectors.
    """

    def split(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tiny = builder.fcmp_ordered(
            "<",
            builder.call(builder.module.declare_intrinsic("llvm.fabs", [_F64]), args),
            ir.Constant(_F64, 2.0**-1022),
        )
        scaled = builder.select(tiny, builder.fmul(args[0], ir.Constant(_F64, 2.0**54)), args[0])
        bits = builder.bitcast(scaled, _I64)
        high = builder.trunc(builder.lshr(bits, ir.Constant(_I64, 32)), _I32)
        field = builder.and_(builder.lshr(high, ir.Constant(_I32, 20)), ir.Constant(_I32, 0x7FF))
        less = builder.select(tiny, ir.Constant(_I32, 1022 + 54), ir.Constant(_I32, 1022))
        exponent = builder.sitofp(builder.sub(field, less), _F64)
        rest = builder.and_(bits, ir.Constant(_I64, 0x800FFFFFFFFFFFFF))
        mantissa = builder.bitcast(builder.or_(rest, ir.Constant(_I64, 1022 << 52)), _F64)
        special = builder.or_(
            builder.icmp_unsigned("==", field, ir.Constant(_I32, 0x7FF)),
            builder.fcmp_ordered("==", args[0], ir.Constant(_F64, 0.0)),
        )
        both = builder.select(special, args[0], mantissa), builder.select(special, ir.Constant(_F64, 0.0), exponent)
        return context.make_tuple(builder, signature.return_type, both)

    return numba.typeof((0.0, 0.0))(types.float64), split
