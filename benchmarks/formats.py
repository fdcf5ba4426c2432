"""How fast quantised weights are decoded, and in how much memory: `python benchmarks/formats.py [ROWS [COLUMNS]]`.

One matrix of each format, of random codes, lies in memory; one thread reads it in chunks. Seconds are the processor's.
GB/s: of bfloat16 that the decoded numbers would be. MiB: what reading takes besides its blocks, as plans count it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from merge.arrays import Array
from merge.chunks import Chunks
from merge.dtypes import DTYPES
from merge.plan import Derived, Stored, TensorRef
from merge.sources import held_bytes, operation
from merge.sources.fp4 import fp4
from merge.sources.integers import integers
from merge.sources.scaled import scaled


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    columns = int(sys.argv[2]) if len(sys.argv) > 2 else rows
    print(f"{rows} x {columns}\n| format | ns a number | GB/s | MiB |\n|---|---:|---:|---:|")
    for name, ref in _formats(rows, columns):
        seconds = min(_seconds(ref) for _ in range(3))
        print(
            f"| {name} | {seconds / ref.size * 1e9:.2f} | {2 * ref.size / seconds / 1e9:.2f} "
            f"| {held_bytes(ref) / 2**20:.1f} |"
        )


def _formats(rows: int, columns: int) -> Iterator[tuple[str, Derived]]:
    n, shape = rows * columns, (rows, columns)

    def part(dtype: str, *sizes: int) -> Stored:
        return Stored("part", dtype, sizes, "f", 0)

    def made(operation_: str, parts: tuple[TensorRef, ...], **parameters: Any) -> Derived:
        return Derived("w", "BF16", shape, operation_, parts, parameters, how="decoded")

    def packed(bits: int, zeros: bool, index: bool = False) -> Derived:
        return integers(
            "w",
            "BF16",
            shape,
            part("U8", n * bits // 8),
            part("BF16", rows, columns // 128),
            bits=bits,
            block=(1, 128),
            row_bytes=columns * bits // 8,
            zeros=part("I32", rows * bits // 32, columns // 128) if zeros else None,
            packed_zeros=zeros,
            index=part("I32", columns) if index else None,
        )

    def transposed(layout: str, bits: int, *index: Stored) -> Derived:
        codes = part("I32", columns, rows // 8) if layout == "awq" else part("I32", columns * bits // 32, rows)
        parts = (codes, part("I32", columns // 128, rows * bits // 32), part("F16", columns // 128, rows), *index)
        return made("packed_columns", parts, layout=layout, bits=bits, group=128, index=bool(index))

    absmax, table = part("F32", n // 64), part("F32", 16)
    yield "FP8, blocks of 128", scaled(part("F8_E4M3", *shape), part("F32", rows // 128, columns // 128), (128, 128))
    yield "bitsandbytes NF4", made("blockwise", (part("U8", n // 2), absmax, table), block=64)
    nested = (part("U8", n // 2), part("U8", n // 64), table, part("F32", n // 16384), part("F32", 256))
    yield "bitsandbytes NF4, double", made("blockwise", nested, block=64, nested_block=256, offset=0.5)
    yield (
        "bitsandbytes INT8",
        integers("w", "BF16", shape, part("I8", *shape), part("F32", rows), bits=8, block=(1, columns), divisor=127),
    )
    yield "compressed-tensors int4", packed(4, zeros=False)
    yield "compressed-tensors int4, zeros", packed(4, zeros=True)
    yield "compressed-tensors int8", packed(8, zeros=False)
    overall = (part("F32", 1),)
    scales = part("F8_E4M3", rows, columns // 16)
    yield "NVFP4", fp4("w", "BF16", shape, part("U8", n // 2), scales, 16, overall="divide", more=overall)
    yield "MXFP4", fp4("w", "BF16", shape, part("U8", n // 2), part("U8", rows, columns // 32), 32)
    yield (
        "MXFP4 of gpt-oss",
        fp4("w", "BF16", shape, part("U8", n // 2), part("U8", columns, rows // 32), 32, transposed=True),
    )
    for bits in (2, 3, 4, 8):
        yield f"GPTQ, {bits} bits", transposed("gptq", bits)
    yield "GPTQ, 4 bits, activation order", transposed("gptq", 4, part("I32", columns))
    yield "AWQ", transposed("awq", 4)


def _seconds(ref: Derived) -> float:
    dice = np.random.default_rng(0)
    chunks, held = Chunks.of(ref.shape), {}
    for place, source in enumerate(ref.inputs):
        dtype = DTYPES[source.dtype]
        whole: Array = dice.random(source.size, np.float32) + np.float32(0.5)
        if not dtype.is_float:
            whole = dice.integers(0, 256, source.nbytes, np.uint8).view(dtype.numpy_name)
        elif source.dtype == "F8_E4M3" and place == 0:
            whole = whole * 8
        if source.dtype == "I32" and len(source.shape) == 1:
            whole = (dice.permutation(source.size) // 128).astype(np.int32)
        held[id(source)] = whole

    def read(source: TensorRef, start: int, out: Array) -> None:
        out[:] = held[id(source)][start : start + len(out)]

    out = np.empty(chunks.length, np.float32)
    begun = time.process_time()
    fill = operation(ref).prepare(ref, read)
    for chunk in range(chunks.count):
        start, stop = chunks.span(chunk)
        fill(start, out[: stop - start])
    return time.process_time() - begun


if __name__ == "__main__":
    main()
