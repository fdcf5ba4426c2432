"""What a tensor may be called and how large it may be, in any format of files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge.dtypes import DTYPES
from merge.quoting import clipped, quoted

MAX_NAME = 8_192  # characters; real names have a hundred
MAX_SIZES = 64  # numpy's and torch's most dimensions
_MAX_BYTES = 2**63 - 1


def name_error(name: str) -> str | None:
    """What is wrong with a tensor's name; None if nothing is."""
    if len(name) > MAX_NAME:
        return f"a tensor's name has at most {MAX_NAME:,} characters, found {clipped(name)}"
    return None


def shape_error(shape: Sequence[int], dtype: str) -> str | None:
    """Why no tensor can have this shape; None if one can.

    Sizes of zero do not excuse the others: of [0, 2^62] no library makes strides, and a row of it fits no memory.
    """
    if len(shape) > MAX_SIZES:
        return f"shape {quoted(list(shape))} overflows: {len(shape):,} sizes, at most {MAX_SIZES} are read"
    size = math.prod(shape) or math.prod(size or 1 for size in shape)
    if size * DTYPES[dtype].itemsize > _MAX_BYTES:
        return f"shape {quoted(list(shape))} of {dtype} overflows: more bytes than any file has"
    return None
