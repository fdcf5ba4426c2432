"""extract_adapter: the difference of two models as an adapter, module by module, resumable.

Memory holds one matrix for each thread (in blocks, if it is larger than difference.KEPT) and its thin factors. Each
module's factors are a file in OUT.partial until all are done.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from merge.architecture import is_embedding
from merge.checkpoint.digest import value_digest
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.engine.executors import ONE_THREAD
from merge.errors import UsageError
from merge.extract.decompose import decompose
from merge.extract.difference import Difference, base_squares
from merge.extract.finish import Summary, finish
from merge.extract.select import Choice, Pair, Selection, Target, select
from merge.jsontext import parse_json
from merge.output.workspace import Workspace, resume
from merge.planners.inputs import Input, Inputs
from merge.processors import processors
from merge.recipe.model import ModelRef, Recipe, Source
from merge.statistics.parts import RUN, Parts, parts_of

PREFIX = "base_model.model."
HEAD = "lm_head.weight"
Progress = Callable[[int], None]  # bytes of the base's tensors that are done


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
    """Writes an adapter that makes `tuned` of `base`, as far as its ranks go.

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
    inputs = Inputs(recipe)
    first, second = inputs.all[inputs.place(base)], inputs.all[inputs.place(tuned)]
    if first is second:
        raise UsageError(f"{tuned.text} is its own base. Name the model that it was fine-tuned from with --base.")
    selection = select(inputs, first, second, choice)
    asked = dataclasses.asdict(choice) | {"method": method, "save_modules": save_modules, "dtype": dtype, "seed": seed}
    files = [*first.checkpoint.files, *second.checkpoint.files]

    def run(fresh: bool) -> Summary:
        with parts_of(_workspace(Path(out), first, second, asked, force), files, fresh) as parts:
            if parts.finished is not None:
                return Summary(**parts.finished)
            with SourceReader(files) as reader, ONE_THREAD:
                work = Work(selection, parts, reader, choice, method, dtype, seed, progress)
                work.run(threads or processors())
                saved = work.save(tied=inputs.tied) if save_modules else {}
                reader.check_unchanged()
            return finish(Path(out), parts, work, saved, (first, second), asked, inputs.notes, began)

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

    def run(self, threads: int) -> None:
        targets = list(enumerate(self.selection.targets))
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(self._target, place, target) for place, target in targets]
            try:
                for job, (place, target) in zip(jobs, targets, strict=True):
                    result = job.result()
                    self.results.append(result)
                    if result["rank"]:
                        self.names.append(_part(place))
                    self._advance(target.pair)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for pair in self.selection.others:
            squares = Difference(pair, self.reader).squares()
            self.others.append((pair, squares, base_squares(pair, self.reader) if squares else 0.0))
            self._advance(pair)
            self.reader.release((pair.base, pair.tuned))

    def _target(self, place: int, target: Target) -> dict[str, Any]:
        part, pair = _part(place), target.pair
        if self.parts.has(part):
            found = parse_json(read_header(str(self.parts.path(part)))[1]["result"])
            if self.parts.changed and found["sources"] != self._sources(pair):
                raise self.parts.work.stale(f"{pair.tuned.file}: {pair.name}, or of its base")
            self.resumed += 1
            return dict(found["result"])
        factors = decompose(Difference(pair, self.reader), target.rank, self.choice.energy, self.method, self.seed)
        self.reader.release((pair.base, pair.tuned))
        result = {"module": pair.module, "shape": list(pair.base.shape), "rank": 0, "energy": 0.0, "lost": 0.0}
        tensors: dict[str, Any] = {}
        if factors is not None:
            left, right = factors.left, factors.right
            a, b = (left.T, right.T) if target.transposed else (right, left)
            names = ("lora_embedding_A", "lora_embedding_B") if target.embedding else ("lora_A.weight", "lora_B.weight")
            for name, values in zip(names, (a, b), strict=True):
                tensors[f"{PREFIX}{pair.module}.{name}"] = values.contiguous().to(_torch_dtype(self.dtype))
            result |= {"rank": left.shape[1], "energy": factors.energy, "lost": factors.lost}
        self.parts.save(part, tensors, {"result": json.dumps({"result": result, "sources": self._sources(pair)})})
        return result

    def _sources(self, pair: Pair) -> list[str]:
        return [value_digest(self.reader, ref) for ref in (pair.base, pair.tuned)]

    def save(self, tied: bool) -> dict[str, str]:
        """Tensors kept whole -> the module they belong to; biases of modules with factors included."""
        with_factors = {result["module"] for result in self.results if result["rank"]}
        pairs = {pair.name: pair for pair in (*self.selection.others, *(t.pair for t in self.selection.targets))}
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
            if tied and is_embedding(name):
                tensors[f"{PREFIX}{HEAD}"] = tensors[key].clone()  # PEFT looks for both of a tied pair
            part = f"saved-{number:05d}"
            self.parts.save(part, tensors)
            self.names.append(part)
        return kept

    def _whole(self, pair: Pair) -> Any:
        import numpy as np
        import torch

        values = np.empty(pair.tuned.size, np.float32)
        self.reader.read_values(pair.tuned, 0, values)
        dtype = pair.tuned.dtype if pair.tuned.scale is None else "BF16"
        return torch.from_numpy(values).reshape(pair.tuned.shape).to(_torch_dtype(dtype))

    def _advance(self, pair: Pair) -> None:
        self._done += pair.base.nbytes
        self._progress(self._done)


def _part(place: int) -> str:
    return f"module-{place:05d}"


def _torch_dtype(name: str) -> Any:
    import torch

    from merge.dtypes import torch_name

    return getattr(torch, torch_name(name))
