"""Rounding errors of a checkpoint's weights in each format, streamed with a few MB for each thread.

Scales as they are used: INT8 one for each row, NF4 one for 64 numbers; the FP8s once as they are and once with a scale
for each row, which moves its largest magnitude to the largest value of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from merge.architecture import is_embedding, is_head
from merge.arrays import F32
from merge.checkpoint import Checkpoint
from merge.checkpoint.reader import SourceReader
from merge.chunks import Chunks
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.kernels.encode import encode
from merge.plan import TensorRef
from merge.processors import processors
from merge.tools.formats import NF4

CLASSES = ("embedding", "attention", "mlp", "norm", "head", "other")
_TYPES = {"BF16": "BF16", "FP16": "F16", "FP8 E4M3": "F8_E4M3", "FP8 E5M2": "F8_E5M2"}
FORMATS = ("TF32", "BF16", "FP16", "FP8 E4M3", "FP8 E4M3 scaled", "FP8 E5M2", "FP8 E5M2 scaled", "INT8", "NF4")
_NF4 = np.array(NF4, np.float32)
_NF4_MIDDLES = ((np.array(NF4[1:]) + np.array(NF4[:-1])) / 2).astype(np.float32)
_TINY = np.float32(1e-30)  # used as the largest magnitude of a row of zeros, so that its scale can divide


@dataclass
class Loss:
    """Sums over weights. `overflow`: finite, but not in the format; `underflow`: not 0, but 0 in the format;
    `changed`: any other value than before; `error`, `square`: sums of squared errors and of squared weights, without
    those that overflow."""

    weights: int = 0
    overflow: int = 0
    underflow: int = 0
    changed: int = 0
    error: float = 0.0
    square: float = 0.0

    def add(self, other: Loss) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the weights."""
        return float(np.sqrt(self.error / self.square)) if self.square else 0.0


@dataclass
class Survey:
    """`losses`: class of tensor ("total" too) -> format -> Loss. `skipped`: tensors that hold no floats."""

    losses: dict[str, dict[str, Loss]] = field(default_factory=dict)
    nonfinite: int = 0
    skipped: list[str] = field(default_factory=list)


def survey(
    checkpoint: Checkpoint, *, threads: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> Survey:
    """Reads every weight once.

    Args:
        threads: that read and round; all processors by default. The result does not depend on them.
        progress: gets bytes read.

    Raises:
        CheckpointError, SourceChanged: the weights cannot be read.
    """
    found = Survey()
    refs = []
    for name, ref in checkpoint.tensors.items():
        if DTYPES[ref.dtype].is_float and ref.size:
            refs.append((name, ref))
        elif ref.size:
            found.skipped.append(name)
    sums: dict[str, dict[str, Loss]] = {kind: {form: Loss() for form in FORMATS} for kind in (*CLASSES, "total")}
    done = 0
    with SourceReader(checkpoint.files) as reader, ThreadPoolExecutor(threads or processors()) as pool:
        for name, ref in refs:
            # Sums in the order of chunks: the same for any number of threads.
            for losses, nonfinite in pool.map(lambda span, ref=ref: _chunk(reader, ref, *span), _spans(ref)):
                found.nonfinite += nonfinite
                for form, loss in losses.items():
                    sums[tensor_class(name)][form].add(loss)
                    sums["total"][form].add(loss)
            done += ref.nbytes
            progress(done)
    found.losses = {kind: losses for kind, losses in sums.items() if losses["BF16"].weights}
    return found


def tensor_class(name: str) -> str:
    """One of CLASSES, from the parts of the name."""
    if is_embedding(name):
        return "embedding"
    if is_head(name):
        return "head"
    lower = name.lower()
    if "norm" in lower or ".ln_" in lower or lower.startswith("ln_"):
        return "norm"
    if "attn" in lower or "attention" in lower:
        return "attention"
    return "mlp" if any(part in lower for part in ("mlp", "ffn", "feed_forward", "expert")) else "other"


def _spans(ref: TensorRef) -> Iterator[tuple[int, int]]:
    chunks = Chunks.of(ref.shape)
    return (chunks.span(chunk) for chunk in range(chunks.count))


def _chunk(reader: SourceReader, ref: TensorRef, start: int, stop: int) -> tuple[dict[str, Loss], int]:
    """Losses of elements start .. stop, and how many are NaN or infinite, which count nowhere else."""
    values = _read(reader, ref, start, stop)
    finite = np.isfinite(values)
    nonfinite = int(values.size - finite.sum())
    if nonfinite:
        values[~finite] = 0
    row = ref.shape[-1] if len(ref.shape) > 1 else values.size
    return {form: _loss(values, _rounded(values, form, row)) for form in FORMATS}, nonfinite


def _read(reader: SourceReader, ref: TensorRef, start: int, stop: int) -> F32:
    if ref.dtype != "F64":
        values = np.empty(stop - start, np.float32)
        reader.read_values(ref, start, values)
        return values
    wide = np.empty(stop - start, np.float64)
    reader.read_into(ref, start, wide)
    with np.errstate(over="ignore"):
        narrow: F32 = wide.astype(np.float32)
    return narrow


def _rounded(values: F32, form: str, row: int) -> F32:
    """values (n,), whole rows -> the stored values (n,)"""
    if form == "INT8":
        scale = _largest(values, row) / np.float32(127)
        whole: F32 = (np.rint(values.reshape(-1, row) / scale) * scale).reshape(-1)
        return whole
    if form == "NF4":
        return nf4_rounded(values)
    if form == "TF32":
        bits = values.view(np.uint32)
        kept = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        return kept.view(np.float32)
    if form.endswith("scaled"):
        dtype = _TYPES[form.removesuffix(" scaled")]
        scale = _largest(values, row) / np.float32(DTYPES[dtype].max_finite)
        scaled = _through((values.reshape(-1, row) / scale).reshape(-1), dtype)
        return (scaled.reshape(-1, row) * scale).reshape(-1)
    return _through(values, _TYPES[form])


def _largest(values: F32, row: int) -> F32:
    """(rows, 1): the largest magnitude of each row"""
    found: F32 = np.maximum(np.abs(values.reshape(-1, row)).max(axis=1, keepdims=True), _TINY)
    return found


def nf4_rounded(values: F32) -> F32:
    """values (n,) in blocks of 64, each with its largest magnitude as scale -> (n,)"""
    padded = np.zeros(-(-values.size // 64) * 64, np.float32)
    padded[: values.size] = values
    blocks = padded.reshape(-1, 64)
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), _TINY)
    codes = np.searchsorted(_NF4_MIDDLES, blocks / scale)
    found: F32 = (_NF4[codes] * scale).reshape(-1)[: values.size]
    return found


def _through(values: F32, dtype: str) -> F32:
    raw = np.empty(values.size, DTYPES[dtype].numpy_name)
    encode(values, dtype, raw)
    out = np.empty_like(values)
    to_float32(dtype, raw, out)
    return out


def _loss(values: F32, stored: F32) -> Loss:
    held = np.isfinite(stored)
    overflow = int(values.size - held.sum())
    if overflow:
        values, stored = values[held], stored[held]
    difference = (stored - values).astype(np.float64)
    wide = values.astype(np.float64)
    return Loss(
        weights=values.size + overflow,
        overflow=overflow,
        underflow=int(((stored == 0) & (values != 0)).sum()),
        changed=int((stored != values).sum()) + overflow,
        error=float(np.square(difference).sum()),
        square=float(np.square(wide).sum()),
    )
