"""Scalar building blocks of all kernels: reading a stored number as float32, and looking at its bits.

They are intrinsics because numba widens integer shifts to 64 bits, which halves what LLVM packs into a vector register.
Kernels read `as_f32(raw[m, i])`, where raw holds bfloat16 as uint16, or float32; the same source serves both.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_I16, _I32, _I64, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compiles a function on its first call, and keeps the code on the disk.

    Strict IEEE arithmetic: no contraction or reordering, so that bytes are the same on every machine.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
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
