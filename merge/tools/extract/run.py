"""extract_adapter: writes the difference of two models as an adapter, module by module, resumable.

Memory holds one matrix for each thread (in blocks, if it is larger than difference.KEPT) and its thin factors. Each
module's factors are a file in OUT.partial until all are done.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.checkpoint.digest import value_digest
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.codec import decode
from merge.errors import UsageError
from merge.jsontext import parse_json
from merge.one_thread import ONE_THREAD
from merge.output.workspace import Workspace, resume
from merge.planning.inputs import Input, open_inputs
from merge.processors import processors
from merge.recipe.model import ModelRef, Recipe, Source
from merge.statistics.parts import RUN, Parts, parts_of
from merge.tools.extract.decompose import DecomposedFactors, decompose
from merge.tools.extract.difference import MatrixDifference, base_squares
from merge.tools.extract.finish import Summary, finish
from merge.tools.extract.select import Choice, ExtractedMatrix, Pair, Selection, select

PREFIX = "base_model.model."
_NAMES = ("lora_A.weight", "lora_B.weight")
Progress = Callable[[int], None]  # bytes of the base's tensors that are finished


def extract_adapter(
    tuned: ModelRef,
    base: ModelRef,
    out: str | os.PathLike[str],
    *,
    choice: Choice | None = None,
    method: str = "randomized",
    save_modules: bool = False,
    dtype: str = "F32",
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda done: None,
) -> Summary:
    """Writes the adapter that turns `base` into `tuned`, as closely as its ranks allow.

    Args:
        choice: modules, ranks and energy.
        method: "randomized" or "exact" singular vectors.
        save_modules: keep differing tensors that cannot be factors whole, through modules_to_save and trained biases.
        dtype: of the factors, "F32", "BF16" or "F16".
        seed: of the randomised method's start.
        threads: modules at once; all processors by default. Never changes the result.
        force: replace `out`, and discard unfinished work of another run.

    Raises:
        MergeError: see merge.errors; OUT.partial stays, and the same call goes on with it.
    """
    began = time.monotonic()
    choice = choice or Choice()
    recipe = Recipe("task_arithmetic", models=(Source(tuned),), base_model=base)
    inputs, _, notes = open_inputs(recipe)
    first, second = inputs.all[inputs.place(base)], inputs.all[inputs.place(tuned)]
    if first is second:
        raise UsageError(f"{tuned.text} is its own base. Name the model that it was fine-tuned from with --base.")
    selection = select(inputs, first, second, choice)
    asked = dataclasses.asdict(choice) | {"method": method, "save_modules": save_modules, "dtype": dtype, "seed": seed}
    files = [*first.checkpoint.files, *second.checkpoint.files]

    def run(fresh: bool) -> Summary:
        with parts_of(_workspace(Path(out), first, second, asked, force), files, fresh) as parts:
            if parts.finished is not None:
                return decode(parts.finished, Summary)
            with SourceReader(files) as reader, ONE_THREAD:
                work = Work(selection, parts, reader, choice, method, dtype, seed, progress)
                work.run(threads or processors())
                saved = work.save() if save_modules else {}
                reader.check_unchanged()
            return finish(Path(out), parts, work, saved, (first, second), asked, notes, began)

    return resume(run, force)


def _workspace(out: Path, base: Input, tuned: Input, asked: Mapping[str, Any], force: bool) -> Workspace:
    places = [(model.ref.text, model.checkpoint.path) for model in (base, tuned)]
    places += [(model.ref.text, file.path) for model in (base, tuned) for file in model.checkpoint.files]
    identity = {"asked": asked, "base": base.ref.text, "tuned": tuned.ref.text}
    return Workspace(out, RUN, "merge lora extract", identity, force=force, sources=places)


class Work:
    """The parts: one for each module with factors, and one for each module that is kept whole."""

    def __init__(
        self,
        selection: Selection,
        parts: Parts,
        reader: SourceReader,
        choice: Choice,
        method: str,
        dtype: str,
        seed: int,
        progress: Progress,
    ) -> None:
        self.selection, self.parts, self.reader = selection, parts, reader
        self.choice, self.method, self.dtype, self.seed = choice, method, dtype, seed
        self._progress, self._done = progress, 0
        self.results: list[dict[str, Any]] = []  # of the targets, in their order
        self.others: list[tuple[Pair, float, float]] = []  # (pair, ‖D‖², ‖base‖²)
        self.names: list[str] = []
        self.resumed = 0

    @property
    def with_factors(self) -> set[str]:
        """The modules that have factors, for their weight or another parameter."""
        targets = zip(self.selection.targets, self.results, strict=True)
        return {target.pair.module for target, result in targets if result["rank"]}

    def run(self, threads: int) -> None:
        groups = list(enumerate(self.selection.groups))
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(self._group, place, group) for place, group in groups]
            try:
                for job, (place, group) in zip(jobs, groups, strict=True):
                    results = job.result()
                    self.results += results
                    if any(result["rank"] for result in results):
                        self.names.append(_part(place))
                    for target in group:
                        self._advance(target.pair)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for pair in self.selection.others:
            squares = MatrixDifference(pair, self.reader).squares()
            self.others.append((pair, squares, base_squares(pair, self.reader) if squares else 0.0))
            self._advance(pair)
            self.reader.release((pair.base, pair.tuned))

    def _group(self, place: int, group: Sequence[ExtractedMatrix]) -> list[dict[str, Any]]:
        """The factors of a module's targets, under PEFT's names: of several parameters the first lies deepest."""
        part = _part(place)
        if self.parts.has(part):
            kept = parse_json(read_header(str(self.parts.path(part)))[1]["results"])
            if self.parts.changed and kept["sources"] != [self._sources(target.pair) for target in group]:
                pair = group[0].pair
                raise self.parts.work.stale(f"{pair.tuned.file}: {pair.name}, or of its base")
            self.resumed += 1
            return list(kept["results"])
        found = [self._target(target) for target in group]
        tensors: dict[str, Any] = {}
        depth = sum(factors is not None for factors, _ in found)
        for target, (factors, _) in zip(group, found, strict=True):
            if factors is not None:
                depth -= 1
                names = ("lora_embedding_A", "lora_embedding_B") if target.embedding else _NAMES
                for name, values in zip(names, factors, strict=True):
                    tensors[f"{PREFIX}{target.pair.module}{'.base_layer' * depth}.{name}"] = values
        results = [result for _, result in found]
        kept = {"results": results, "sources": [self._sources(target.pair) for target in group]}
        self.parts.save(part, tensors, {"results": json.dumps(kept)})
        return results

    def _target(self, target: ExtractedMatrix) -> tuple[tuple[Any, Any] | None, dict[str, Any]]:
        """(A, B) as PEFT stores them, None if nothing differs; and their entry in the report."""
        pair = target.pair
        matrices = [pair.expert(i) for i in range(pair.base.shape[0])] if len(pair.base.shape) == 3 else [pair]
        found = []
        for matrix in matrices:
            difference = MatrixDifference(matrix, self.reader)
            found.append(decompose(difference, target.rank, self.choice.energy, self.method, self.seed))
            self.reader.release((matrix.base, matrix.tuned))
        self.reader.release((pair.base, pair.tuned))
        rank = max((factors.left.shape[1] for factors in found if factors is not None), default=0)
        result = {
            "module": target.name,
            "parameter": target.parameter,
            "shape": list(pair.base.shape),
            "rank": rank,
            "energy": sum(factors.energy for factors in found if factors is not None),
            "lost": sum(factors.lost for factors in found if factors is not None),
        }
        if not rank:
            return None, result
        both = [self._turned(factors, target, matrices[0], rank) for factors in found]
        a = torch.cat([a for a, _ in both])
        b = torch.stack([b for _, b in both], dim=2).reshape(both[0][1].shape[0], -1)  # column k · experts + e
        kind = _torch_dtype(self.dtype)
        return (a.contiguous().to(kind), b.contiguous().to(kind)), result

    def _turned(
        self, factors: DecomposedFactors | None, target: ExtractedMatrix, matrix: Pair, rank: int
    ) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of a matrix, with rows and columns of zeros up to the rank."""
        rows, columns = matrix.base.shape
        left = torch.zeros(rows, rank) if factors is None else _wider(factors.left, rank)
        right = torch.zeros(rank, columns) if factors is None else _wider(factors.right.T, rank).T
        return (left.T, right.T) if target.transposed else (right, left)

    def _sources(self, pair: Pair) -> list[str]:
        return [value_digest(self.reader, ref) for ref in (pair.base, pair.tuned)]

    def save(self) -> dict[str, str]:
        """Tensors kept whole -> the module they belong to; biases of modules with factors included."""
        with_factors = self.with_factors
        factored = (target.pair for target in self.selection.targets)
        pairs = {pair.name: pair for pair in (*self.selection.others, *factored)}
        changed = {pair.module for pair, squares, _ in self.others if squares and self.choice.takes(pair.module)}
        kept: dict[str, str] = {}
        for module in sorted(changed):
            inside = [name for name in pairs if name.startswith(f"{module}.")]
            if any(name.removeprefix(f"{module}.") not in ("weight", "bias") for name in inside):
                continue  # a parameter beside modules: PEFT saves modules
            for name in inside:
                if module in with_factors and name.endswith(".weight"):
                    continue
                kept[name] = module
        for number, (name, module) in enumerate(kept.items()):
            key = f"{PREFIX}{module}.base_layer.bias" if module in with_factors else PREFIX + name
            tensors = {key: self._whole(pairs[name])}
            for twin, source in self.selection.ties.items():
                if source == name:
                    tensors[PREFIX + twin] = tensors[key].clone()  # PEFT looks for all tied ones
            part = f"saved-{number:05d}"
            self.parts.save(part, tensors)
            self.names.append(part)
        return kept

    def _whole(self, pair: Pair) -> Any:
        values = np.empty(pair.tuned.size, np.float32)
        self.reader.read_values(pair.tuned, 0, values)
        return torch.from_numpy(values).reshape(pair.tuned.shape).to(_torch_dtype(pair.tuned.dtype))

    def _advance(self, pair: Pair) -> None:
        self._done += pair.base.nbytes
        self._progress(self._done)


def _wider(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _part(place: int) -> str:
    return f"module-{place:05d}"


def _torch_dtype(name: str) -> Any:
    from merge.dtypes import torch_name

    return getattr(torch, torch_name(name))
