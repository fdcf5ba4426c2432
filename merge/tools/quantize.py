"""quantize: a checkpoint -> one whose linear layers are stored in 8 or 4 bits; streamed, resumable, verified.

Calibration-free, weights only. A thread holds 128 rows of a matrix at a time. The output directory, its journal and its
manifest are those of `merge run`: killed, the same call goes on, and `merge verify` checks the result.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.arrays import F32
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.digest import stored_digest
from merge.checkpoint.formats import quant_method
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.side_files import module_folders
from merge.chunks import Chunks, digest_of
from merge.codec import decode
from merge.dtypes import DTYPES, torch_name
from merge.engine.space import check_space
from merge.errors import NumbersError, UsageError
from merge.kernels.encode import encode
from merge.output.manifest import MANIFEST, manifest_bytes, side_file_bytes
from merge.output.shards import INDEX, index_text, lay_out
from merge.output.task import task_of
from merge.output.workspace import resume
from merge.output.writer import OutputDirectory
from merge.plan import Plan, SideFile, SourceModel, Step, TensorRef
from merge.processors import processors
from merge.recipe.model import ModelRef
from merge.tools.quantizers import ROWS, Dequantized, Encoder, Quantizer, make_quantizer
from merge.tools.stored_formats import FORMATS

_SOURCES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Quantized:
    """`errors`: module -> root mean square of the error over that of the weights. Sizes are of weight files."""

    out: str
    to: str
    layers: int
    kept: int
    bytes_before: int
    bytes_after: int
    errors: dict[str, float]
    notes: tuple[str, ...]


def quantize(
    model: ModelRef,
    out: Path,
    to: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dequantize: bool = False,
    nested: bool = False,
    threads: int | None = None,
    shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Quantized:
    """Writes `out`.

    Args:
        to: one of FORMATS.
        include, exclude: patterns of module names (model.layers.0.*); of linear layers that are not the head, those
            that match some `include`, if there are any, and no `exclude`.
        dequantize: write what the quantised numbers mean, in the model's own dtypes.
        nested: with nf4 and dequantize, scales are quantised too, as in QLoRA.
        progress: gets bytes read.

    Raises:
        UsageError: the model is quantised already, or no layer is left.
        NumbersError: NaN or infinite weights, with their file and tensor.
        MergeError: see merge.errors; OUT.partial stays.
    """
    checkpoint = open_checkpoint(model)
    modules, kept = _choose(checkpoint, include, exclude)
    quantizer = make_quantizer(to, {name: (ref.shape[0], ref.shape[1]) for name, ref in modules.items()})
    if dequantize:
        quantizer, to = Dequantized(quantizer, nested), f"{to}{' nested' if nested else ''} dequantized"
    plan = _plan(checkpoint, modules, kept, quantizer, to, out.name, shard_bytes)
    check_space(plan, out)

    def work(fresh: bool) -> Quantized:
        with OutputDirectory(plan, out, force, fresh=fresh) as output:
            if output.finished is not None:
                return decode(output.finished, Quantized)
            with SourceReader(checkpoint.files) as reader:
                _write(_Writer(output, reader, quantizer), modules, threads, progress)
                reader.check_unchanged()
            errors = {
                _owner(step.name, modules): output.records[index]["relative_rms"]
                for index, step in enumerate(plan.steps)
                if "relative_rms" in output.records[index]
            }
            before = sum(ref.nbytes for ref in checkpoint.tensors.values())
            after = sum(step.nbytes for step in plan.steps)
            ordered = dict(sorted(errors.items()))
            report = Quantized(str(out), to, len(modules), len(kept), before, after, ordered, plan.notes)
            files = side_file_bytes(plan)
            manifest = manifest_bytes(plan, output.records, files)
            output.complete(files, (MANIFEST, manifest), dataclasses.asdict(report))
            return report

    return resume(work, force)


def _write(
    writer: _Writer, modules: dict[str, TensorRef], threads: int | None, progress: Callable[[int], None]
) -> None:
    """All tensors, a module at a time."""
    groups: dict[str, list[int]] = {}
    for index, step in enumerate(writer.output.plan.steps):
        groups.setdefault(_owner(step.name, modules), []).append(index)
    done = 0
    with writer.output.flushing(), ThreadPoolExecutor(threads or processors()) as pool:
        if writer.output.changed:
            list(pool.map(lambda item: writer.check(item[1]), groups.items()))
            writer.output.prove()
        for size in pool.map(lambda item: writer.group(modules.get(item[0]), item[1]), groups.items()):
            done += size
            progress(done)


def _choose(
    checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, TensorRef], list[str]]:
    """(modules to quantise, linear layers that stay): only what transformers makes nn.Linear of can be loaded again."""
    import torch
    from torch import nn

    from merge.loading import check_stored, load_config
    from merge.tools.memory_trace import build_model

    if (method := quant_method(checkpoint.config)) is not None:
        raise UsageError(f"{checkpoint.path}: is already quantised ({method}). Name the original model.")
    with torch.device("meta"):
        network = build_model(load_config(checkpoint.path), "bfloat16")
    check_stored(network, {name: ref.shape for name, ref in checkpoint.tensors.items()}, checkpoint.path)
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    chosen: dict[str, TensorRef] = {}
    kept: list[str] = []
    for name, module in network.named_modules():
        if type(module) is not nn.Linear:
            continue
        ref = checkpoint.tensors.get(f"{name}.weight")
        asked = (module is not head and not include) or any(fnmatch.fnmatchcase(name, each) for each in include)
        barred = any(fnmatch.fnmatchcase(name, each) for each in exclude)
        fits = ref is not None and ref.shape == tuple(module.weight.shape) and ref.dtype in _SOURCES and ref.is_exact
        if asked and not barred and fits and ref is not None:
            chosen[name] = ref
        else:
            kept.append(name)
    if not chosen:
        there = ", ".join(kept[:3]) or "none"
        raise UsageError(
            f"{checkpoint.path}: no linear layer to quantise (--include, --exclude). Linear layers: {there} ..."
        )
    return chosen, kept


def _plan(
    checkpoint: Checkpoint,
    modules: dict[str, TensorRef],
    kept: list[str],
    quantizer: Quantizer,
    to: str,
    name: str,
    shard_bytes: int,
) -> Plan:
    steps = []
    for tensor, ref in checkpoint.tensors.items():
        module = tensor.removesuffix(".weight")
        if modules.get(module) is not ref:
            steps.append(Step(tensor, ref.shape, ref.dtype, "", 0, "copy", (ref,), (0,)))
            continue
        for part in quantizer.parts((ref.shape[0], ref.shape[1]), torch_name(ref.dtype)):
            source = ((ref,), (0,)) if part.value is None and part.suffix.startswith("weight") else ((), ())
            if part.suffix in ("weight.absmax", "weight_scale", "weight_scale_inv"):
                source = ((), ())
            steps.append(Step(f"{module}.{part.suffix}", part.shape, part.dtype, "", 0, to, *source))
    placed, shards = lay_out(steps, shard_bytes, modules=module_folders(checkpoint.path))
    config = dict(checkpoint.config)
    if settings := quantizer.config(kept):
        config["quantization_config"] = settings
    side = [SideFile("config.json", text=json.dumps(config, indent=2, ensure_ascii=False) + "\n")]
    if (index := index_text(placed, shards)) is not None:
        side.append(SideFile(INDEX, text=index))
    side += [SideFile.copy(file, os.path.join(checkpoint.path, file)) for file in checkpoint.side_files()]
    side.append(SideFile("README.md", text=_card(checkpoint, to, name, len(modules), len(kept))))
    source_model = SourceModel(checkpoint.ref.text, checkpoint.path, checkpoint.revision, checkpoint.files)
    text = f"quantize: {checkpoint.ref.text}\nto: {to}\n"
    notes = tuple(f"{checkpoint.ref.text}: {note}" for note in checkpoint.notes)
    return Plan(name, f"quantize {to}", 0, (source_model,), None, placed, shards, tuple(side), (), notes, text)


def _card(checkpoint: Checkpoint, to: str, name: str, n_layers: int, n_kept: int) -> str:
    task = task_of(checkpoint.config, embeds=bool(module_folders(checkpoint.path)))
    head = ["---", "library_name: transformers", *([f"pipeline_tag: {task}"] if task else [])]
    if checkpoint.revision is not None:
        head += [f"base_model: {json.dumps(checkpoint.ref.path)}", "base_model_relation: quantized"]
    format_, _, means = to.partition(" ")
    how = FORMATS[format_].title
    stored = f"hold their values after rounding to {how}" if means else f"are stored as {how}"
    lines = [
        *(*head, "tags:", "- merge-workbench", f"- {format_}", "---", "", f"# {name}", ""),
        f"{checkpoint.ref.text}, quantised{' and dequantised' if means else ''} with Merge Workbench.",
        "",
        f"{n_layers} linear layers {stored}; {n_kept} others, embeddings and norms are as they were.",
        "",
        "`merge_manifest.json` has the error of each layer and the digests that `merge verify` checks.",
        "",
    ]
    return "\n".join(lines)


def _owner(tensor: str, modules: dict[str, TensorRef]) -> str:
    """The module whose parts a tensor is one of; its own name for a tensor that is copied."""
    parts = tensor.split(".")
    return next(
        (m for n in range(len(parts) - 1, 0, -1) if (m := ".".join(parts[:n])) in modules and _is_part(parts[n:])),
        tensor,
    )


def _is_part(rest: Sequence[str]) -> bool:
    return rest[0].startswith("weight") or list(rest) == ["SCB"]


class _Writer:
    def __init__(self, output: OutputDirectory, reader: SourceReader, quantizer: Quantizer) -> None:
        self.output, self._reader, self._quantizer = output, reader, quantizer

    def check(self, indexes: list[int]) -> None:
        """Raises StaleWork if tensors that are done were made from something else than what is there now."""
        for index in indexes:
            step, record = self.output.plan.steps[index], self.output.records.get(index)
            if record is not None and record["sources"] != self._sources(step):
                raise self.output.stale(f"{step.inputs[0].name} in {step.inputs[0].file}")

    def group(self, module: TensorRef | None, indexes: list[int]) -> int:
        """Writes a module's tensors, or a copied one, unless an earlier run did; returns the bytes that were read."""
        steps = {index: self.output.plan.steps[index] for index in indexes}
        records = self.output.records
        if not all(i in records and records[i]["digest"] == self._digest(step) for i, step in steps.items()):
            error = self._copy(steps[indexes[0]]) if module is None else self._encode(module, list(steps.values()))
            for i, step in steps.items():
                extra = {"relative_rms": error} if module is not None and step.sources else {}
                self.output.finish(i, {"digest": self._digest(step), "sources": self._sources(step), **extra})
        return module.nbytes if module is not None else steps[indexes[0]].bytes_read

    def _sources(self, step: Step) -> list[str]:
        return [stored_digest(self._reader, ref) for ref in step.sources]

    def _copy(self, step: Step) -> float:
        source, chunks = step.inputs[0], Chunks.of(step.shape)
        for chunk in range(chunks.count):
            start, stop = chunks.span(chunk)
            data = np.empty(stop - start, DTYPES[source.dtype].numpy_name)
            self._reader.read_into(source, start, data)
            self.output.write(step, start, data.view(np.uint8).data, DTYPES[step.dtype].itemsize)
        return 0.0

    def _encode(self, ref: TensorRef, steps: list[Step]) -> float:
        """All parts of a matrix; returns its relative RMS error."""
        rows, columns = ref.shape
        parts = self._quantizer.parts((rows, columns), torch_name(ref.dtype))
        by_suffix = {part.suffix: next(s for s in steps if s.name.endswith(f".{part.suffix}")) for part in parts}
        places = dict.fromkeys(by_suffix, 0)
        for part in parts:
            if part.value is not None:
                self._write(by_suffix[part.suffix], 0, part.value.reshape(-1))
        error = square = 0.0
        quantizer = self._quantizer
        encoder: Encoder = quantizer.encode
        if isinstance(quantizer, Dequantized):
            encoder = quantizer.encoder(self._pieces(ref))
        for values in self._pieces(ref):
            pieces, meant = encoder(values)
            for suffix, piece in pieces.items():
                self._write(by_suffix[suffix], places[suffix], piece)
                places[suffix] += piece.size
            error += float(np.square((meant - values).astype(np.float64)).sum())
            square += float(np.square(values.astype(np.float64)).sum())
        return float(np.sqrt(error / square)) if square else 0.0

    def _pieces(self, ref: TensorRef) -> Iterator[F32]:
        """A matrix, some rows at a time."""
        rows, columns = ref.shape
        for start in range(0, rows, ROWS):
            values = np.empty((min(ROWS, rows - start), columns), np.float32)
            self._reader.read_values(ref, start * columns, values.reshape(-1))
            if not np.isfinite(values).all():
                module = ref.name.removesuffix(".weight")
                raise NumbersError(
                    f"{ref.file}: {ref.name}: NaN or infinite values, which cannot be quantised. Repair the "
                    f"model, or leave the module unchanged: --exclude {module}."
                )
            yield values

    def _write(self, step: Step, element: int, values: np.ndarray[Any, Any]) -> None:
        if values.dtype == np.float32 and step.dtype != "F32":
            numbers = np.ascontiguousarray(values).reshape(-1)
            values = np.empty(numbers.size, DTYPES[step.dtype].numpy_name)
            encode(numbers, step.dtype, values)
        self.output.write(step, element, np.ascontiguousarray(values).data, DTYPES[step.dtype].itemsize)

    def _digest(self, step: Step) -> str:
        itemsize = DTYPES[step.dtype].itemsize

        def read(start: int, stop: int) -> memoryview:
            data = np.empty((stop - start) * itemsize, np.uint8).data
            self.output.read_into(step, start, data, itemsize)
            return data

        return digest_of(step.shape, read)
