"""write_gguf: streams a model, or a recipe's result while it is computed, into one GGUF file.

Tensors are read, merged where the model is a recipe, quantised by blocks of rows, and written at their final offsets.
Memory does not grow with the model, and no safetensors are written in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merge.checkpoint import Checkpoint
from merge.checkpoint.reader import SourceReader
from merge.codec import decode
from merge.engine.crew import Crew
from merge.errors import NumbersError, UsageError
from merge.gguf_layouts import described, family_of
from merge.jobs.pipelines.plan import PipelinePlanner, StagePlan, not_by_blocks, streamed
from merge.needs import need
from merge.output.directory import explained
from merge.output.identity import plan_digest, source_files, stamps
from merge.output.shard_files import write_at
from merge.output.workspace import Workspace
from merge.plan import Plan
from merge.planning.load import load_pipeline
from merge.processors import processors
from merge.sources.gguf_rows import row_bytes
from merge.tools.convert import convert_plan
from merge.tools.to_gguf.tensors import GgufTensor, gguf_tensors
from merge.tools.to_gguf.types import TYPES, encode_rows, file_type, type_of
from merge.tools.to_gguf.vocabulary import add_vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_BLOCK = 1 << 20  # elements
_MARK = "gguf.json"


@dataclass(frozen=True)
class GgufReport:
    """What was written; `kinds`: number of tensors of each type."""

    out: str
    to: str
    tensors: int
    bytes_written: int
    kinds: dict[str, int]
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Placed:
    tensor: GgufTensor
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


def write_gguf(
    model: str,
    out: Path,
    to: str = "f16",
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> GgufReport:
    """Writes `out`.

    Args:
        model: a directory, a hub id, model+adapter, or a recipe's file.
        to: a key of TYPES.
        progress: gets bytes done, and of how many.

    Raises:
        UsageError: a class, tokenizer, tensor or type that cannot be written; a recipe that must be merged first.
        NumbersError: values that are not finite, or not in float16.
        MergeError: see merge.errors.
    """
    need("a GGUF file", "gguf", "gguf")
    if to not in TYPES:
        raise UsageError(f'--to "{to}": expected {", ".join(TYPES)}.')
    began = time.monotonic()
    plan, checkpoint = _source(model)
    family = family_of(checkpoint.config, checkpoint.path)
    tensors = gguf_tensors(family, checkpoint.config, checkpoint.tensors, checkpoint.path)
    kinds = [type_of(tensor.name, tensor.shape, to) for tensor in tensors]
    identity = {"plan": plan_digest(plan), "files": stamps(plan), "to": to}
    sources = [(each.ref, each.path) for each in plan.models]
    work = Workspace(out, _MARK, "merge convert", identity, force=force, sources=sources, kind="file")
    with work:
        if work.finished is not None:
            return decode(work.finished, GgufReport)
        with explained(work.partial):
            work.clear()
            (work.partial / _MARK).write_text("{}")
            writer = _writer(work.result, family.arch, plan, checkpoint, to)
            family.describe(writer, checkpoint.config)
            placed, size = _header(writer, tensors, kinds)
        with SourceReader(source_files(plan)) as reader, _opened(work.result, size) as file:
            _write_all(_Writing(reader, file, work.partial), placed, threads, size, progress)
            reader.check_unchanged()
            with explained(work.partial):
                os.fsync(file)
        names = [kind.name for kind in kinds]
        report = GgufReport(
            out=str(out),
            to=to,
            tensors=len(placed),
            bytes_written=size,
            kinds={name: names.count(name) for name in dict.fromkeys(names)},
            seconds=round(time.monotonic() - began, 3),
            notes=plan.notes,
        )
        work.complete(dataclasses.asdict(report))
    return report


def _source(model: str) -> tuple[Plan, Checkpoint]:
    """What is to be carried out, and its result as a checkpoint of tensors that are computed while they are read."""
    if model.endswith((".yaml", ".yml")):
        *earlier, last = PipelinePlanner(load_pipeline(model)).planned
        obstacle = next((f"stage {stage.name}: {stage.reason}" for stage in earlier if stage.reason), "")
        obstacle = obstacle or not_by_blocks(last.plan)
        if obstacle:
            raise UsageError(
                f"{model}: cannot be merged into a GGUF file in one pass ({obstacle}). Use merge run first, then "
                "convert the result."
            )
        return last.plan, streamed(last)
    plan = convert_plan(model)
    return plan, streamed(StagePlan(plan.name, plan, (), "result", None))


def _writer(path: Path, arch: str, plan: Plan, checkpoint: Checkpoint, to: str) -> GGUFWriter:
    import gguf

    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(file_type(to))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_base_model_count(len(plan.models))
    for number, model in enumerate(plan.models):
        writer.add_base_model_name(number, model.ref)
    writer.add_string("merge_workbench.recipe", plan.recipe_text)
    writer.add_string("merge_workbench.plan", plan_digest(plan))
    described(writer, checkpoint.config)
    add_vocabulary(writer, checkpoint.tokenizer_path, checkpoint.config)
    return writer


def _header(
    writer: GGUFWriter, tensors: list[GgufTensor], kinds: list[GGMLQuantizationType]
) -> tuple[list[_Placed], int]:
    """Writes the header; (where each tensor goes, bytes of the file)"""
    sizes = []
    for tensor, kind in zip(tensors, kinds, strict=True):
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        sizes.append(rows * row_bytes(tensor.shape[-1], kind.name))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), sizes[-1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    offset = writer.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    writer.close()
    placed = []
    for tensor, kind, size in zip(tensors, kinds, sizes, strict=True):
        placed.append(_Placed(tensor, kind, offset, size))
        offset += writer.ggml_pad(size, writer.data_alignment)
    return placed, offset


@contextlib.contextmanager
def _opened(path: Path, size: int) -> Iterator[int]:
    file = os.open(path, os.O_RDWR)
    try:
        os.truncate(file, size)
        yield file
    finally:
        os.close(file)


@dataclass(frozen=True)
class _Writing:
    reader: SourceReader
    file: int
    partial: Path
    seeking: threading.Lock = field(default_factory=threading.Lock)


def _write_all(
    writing: _Writing,
    placed: list[_Placed],
    threads: int | None,
    size: int,
    progress: Callable[[int, int], None],
) -> None:
    done: list[int] = []

    def write(one: _Placed) -> None:
        _write(writing, one)
        done.append(one.nbytes)

    largest_first = sorted(placed, key=lambda one: -one.nbytes)
    Crew(threads or processors()).each(write, largest_first, lambda: progress(sum(done), size))
    progress(size, size)


def _write(writing: _Writing, one: _Placed) -> None:
    tensor, offset = one.tensor, one.offset
    if tensor.values:
        _put(writing, np.array(tensor.values, np.float32)[None], one, offset)
        return
    for part in tensor.parts:
        is_vector = len(part.shape) == 1
        length = part.shape[-1] if not is_vector else 1 if tensor.head else part.size
        unit = length * (tensor.head or 1)  # whole heads, where their halves are interleaved
        step = max(1, _BLOCK // unit) * unit
        for start in range(0, part.size, step):
            values = np.empty(min(step, part.size - start), np.float32)
            writing.reader.read_values(part, start, values)
            rows = tensor.interleaved(values.reshape(-1, length))
            rows = rows.reshape(1, -1) if is_vector else rows
            offset += _put(writing, rows + np.float32(tensor.add) if tensor.add else rows, one, offset)
        writing.reader.release([part])


def _put(writing: _Writing, rows: npt.NDArray[np.float32], one: _Placed, offset: int) -> int:
    encoded: npt.NDArray[Any] = encode_rows(np.ascontiguousarray(rows), one.kind)
    finite = encoded if encoded.dtype.kind == "f" else rows
    if not np.isfinite(finite).all():
        what = "values beyond float16; use --to bf16" if np.isfinite(rows).all() else "values that are not finite"
        raise NumbersError(f"{one.tensor.parts[0].name if one.tensor.parts else one.tensor.name}: {what}.")
    data = np.ascontiguousarray(encoded).data.cast("B")
    with explained(writing.partial):
        write_at(writing.file, data, offset, writing.seeking)
    return data.nbytes
