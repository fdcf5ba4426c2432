"""Steps of kind "factor": A or B of the combined change that adapters make to one module.

Both factors come from one decomposition, but each is its own step. The first of the two computes both and keeps the
other for its step. After a kill in between, both are computed again, with the same bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merge.arrays import F64
from merge.chunks import Chunks, digest_of, tensor_digest
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.engine.context import Context
from merge.engine.costs import dense_step, method_of
from merge.engine.emit import Emitter
from merge.engine.merging import arguments, run_definition
from merge.one_thread import ONE_THREAD
from merge.plan import Derived, Step, TensorRef
from merge.planning.factors import is_exact, on_factors, rank_of

if TYPE_CHECKING:
    from torch import Tensor

    from merge.kernels.low_rank import LowRank


@dataclass(frozen=True)
class _Source:
    """One adapter's module as read; a and b are None if the adapter lacks it."""

    a: F64 | None
    b: F64 | None
    scaling: float
    digest: str
    nonfinite: int


@dataclass(frozen=True)
class _Result:
    """The factors, further entries for the records, and what was read."""

    factors: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]
    digests: list[str]
    nonfinite: list[int]


@dataclass
class PendingFactors:
    """Results of modules whose other factor is still to be written, by module."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    modules: dict[str, threading.Lock] = field(default_factory=dict)
    waiting: dict[str, _Result] = field(default_factory=dict)


def run(context: Context, index: int, step: Step) -> dict[str, object]:
    """Always on the CPU."""
    module = step.inputs[0].name
    pending: PendingFactors = context.shared.setdefault("factors", PendingFactors())
    with pending.lock:
        own = pending.modules.setdefault(module, threading.Lock())
    with own:
        result = pending.waiting.pop(module, None)
        if result is None:
            result = pending.waiting[module] = _compute(context, step)
    values = result.factors.pop(step.factor).reshape(-1)  # only the other one stays in memory
    emitter = Emitter(step, context.out, context.buffers)
    chunks = Chunks.of(step.shape)
    for chunk in range(chunks.count):
        start, stop = chunks.span(chunk)
        emitter.put(start, values[start:stop])
    return emitter.record(result.digests, result.nonfinite) | result.facts


def sources(context: Context, step: Step) -> dict[str, object]:
    """Entries of each adapter's module for the records; see _read."""
    return {"sources": [_read(context, ref).digest for ref in step.inputs]}


def summary(steps: Iterable[Step], records: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Kept energy of a truncated adapter, for the manifest and the run's last lines; None if nothing was truncated."""
    found = {
        step.inputs[0].name: (records[i]["energy"], records[i]["kept_energy"])
        for i, step in enumerate(steps)
        if step.factor == "A" and records[i].get("kept_energy") is not None
    }
    if not found:
        return None
    total = math.fsum(energy for energy, _ in found.values())
    kept = math.fsum(energy * share for energy, share in found.values())
    least = min(found, key=lambda module: found[module][1])
    return {
        "modules": len(found),
        "kept_energy": kept / total if total else 1.0,
        "least": {"module": least, "kept_energy": found[least][1]},
    }


def _compute(context: Context, step: Step) -> _Result:
    sources = [_read(context, ref) for ref in step.inputs]
    kind = np.float64 if step.dtype == "F64" else np.float32
    if is_exact(step):
        a, b = _side_by_side(sources, _weights(step))
        facts: dict[str, Any] = {}
    else:
        a, b, facts = _decomposed(context, step, sources)
    with np.errstate(over="ignore"):  # counted, and refused, where it is written
        factors = {"A": a.astype(kind), "B": b.astype(kind)}
    return _Result(factors, facts, [one.digest for one in sources], [one.nonfinite for one in sources])


def _side_by_side(sources: list[_Source], factors: tuple[float, ...]) -> tuple[F64, F64]:
    pairs = [(one, factor) for one, factor in zip(sources, factors, strict=True) if one.a is not None]
    a = np.concatenate([one.a for one, _ in pairs if one.a is not None])
    b = np.concatenate([one.b * (factor * one.scaling) for one, factor in pairs if one.b is not None], axis=1)
    return a, b


def _decomposed(context: Context, step: Step, sources: list[_Source]) -> tuple[F64, F64, dict[str, object]]:
    rank = rank_of(step)
    found = None
    if not any(one.nonfinite for one in sources):
        with ONE_THREAD:
            found = _low_rank(context, step, sources, rank)
    if found is None:  # NaN has no singular values; the run stops at it, unless the recipe allows it
        rows, columns = step.inputs[0].shape
        return np.full((rank, columns), np.nan), np.full((rows, rank), np.nan), {}
    share = min(1.0, found.kept / found.energy) if found.energy > 0 else 1.0
    return found.a.numpy(), found.b.numpy(), {"energy": found.energy, "kept_energy": share}


def _low_rank(context: Context, step: Step, sources: list[_Source], rank: int) -> LowRank | None:
    import torch

    from merge.kernels import low_rank

    parts = [
        low_rank.Factors(torch.from_numpy(one.a), torch.from_numpy(one.b), one.scaling)
        if one.a is not None and one.b is not None
        else None
        for one in sources
    ]
    keywords = arguments(context, step)
    how = on_factors(step)
    if how is None:
        merged = _dense(context, step, keywords)
        return low_rank.nearest(merged, rank) if merged.isfinite().all() else None
    if how.weights is not None:
        present = [(part, weight) for part, weight in zip(parts, _weights(step), strict=True) if part is not None]
        return low_rank.nearest_sum([part for part, _ in present], [weight for _, weight in present], rank)
    rows, columns = step.inputs[0].shape
    none = low_rank.Factors(torch.zeros(0, columns).double(), torch.zeros(rows, 0).double(), 1.0)
    found: LowRank = how.load_compute()([part or none for part in parts], rank, **keywords)
    return found


def _weights(step: Step) -> tuple[float, ...]:
    """The factor of each adapter's change in a weighted sum."""
    how = on_factors(step)
    assert how is not None
    assert how.weights is not None
    return how.weights(step.parameters)


def _dense(context: Context, step: Step, keywords: dict[str, object]) -> Tensor:
    """(out, in) float64: the method on the changes themselves, with a base of zeros"""
    import torch

    method = method_of(step)
    fused = method.load_fused()
    whole = dense_step(step)
    if fused is None:
        changes = np.empty((len(step.inputs), *whole.shape), np.float32)
        for ref, into in zip(step.inputs, changes, strict=True):
            context.reader.read_values(ref, 0, into.reshape(-1))
        merged_whole: Tensor = run_definition(method, whole, torch.from_numpy(changes), keywords)
        return merged_whole.to(torch.float64)
    tensor = context.tensor(whole, n_passes=2 if method.locality == "tensor" else 1)
    combine = fused(tensor, **keywords)
    merged = np.empty(whole.size, np.float32)

    def block(state: None, span: tuple[int, int]) -> None:
        loaded = tensor.load(*span)
        combine(loaded, merged[loaded.start : loaded.start + loaded.raw.shape[1]])

    context.crew.fold(lambda: None, block, tensor.blocks(context.block_chunks))
    context.reader.release(whole.sources)
    return torch.from_numpy(merged.reshape(whole.shape)).to(torch.float64)


def _read(context: Context, ref: TensorRef) -> _Source:
    """One adapter's module, read whole. Its digest covers those of A and B."""
    assert isinstance(ref, Derived)
    if not ref.inputs:
        return _Source(None, None, 0.0, "", 0)
    parts, digests, nonfinite = [], b"", 0
    for part in ref.inputs:
        raw = np.empty(part.size, DTYPES[part.dtype].numpy_name)
        context.reader.read_into(part, 0, raw)
        values = np.empty(part.size, np.float32)
        to_float32(part.dtype, raw, values)
        digests += bytes.fromhex(digest_of(part.shape, lambda start, stop, raw=raw: raw[start:stop].data))  # type: ignore[misc]
        nonfinite += int(values.size - np.isfinite(values).sum())
        parts.append(values.reshape(part.shape).astype(np.float64))
    return _Source(parts[0], parts[1], ref.parameters["scaling"], tensor_digest([digests]), nonfinite)
