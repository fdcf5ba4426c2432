"""extract_adapter: the difference of two models as an adapter, module by module, resumable.

Memory holds one matrix for each thread (in blocks, if it is larger than difference.KEPT) and its thin factors. Each
module's factors are a file in OUT.partial until all are done.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge.architecture import is_embedding
from merge.checkpoint.reader import SourceReader
from merge.engine.executors import ONE_THREAD
from merge.errors import UsageError
from merge.extract.decompose import decompose
from merge.extract.difference import Difference, base_squares
from merge.extract.finish import Summary, finish
from merge.extract.select import Choice, Pair, Selection, Target, select
from merge.extract.write import WEIGHTS
from merge.jsontext import parse_json
from merge.output.directory import check_out, partial_of, take_lock
from merge.planners.inputs import Input, Inputs
from merge.processors import processors
from merge.recipe.model import ModelRef, Recipe, Source
from merge.statistics.parts import Parts

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
    with _directory(Path(out), (first, second), asked, force) as parts, ONE_THREAD:
        files = [*first.checkpoint.files, *second.checkpoint.files]
        with SourceReader(files) as reader:
            work = Work(selection, parts, reader, choice, method, dtype, seed, progress)
            work.run(threads or processors())
            saved = work.save(tied=inputs.tied) if save_modules else {}
            reader.check_unchanged()
        summary = finish(Path(out), parts, work, saved, (first, second), asked, inputs.notes)
    return dataclasses.replace(summary, seconds=round(time.monotonic() - began, 3))


@contextmanager
def _directory(out: Path, models: tuple[Input, Input], asked: Mapping[str, Any], force: bool) -> Iterator[Parts]:
    """OUT.partial with its lock; the parts of an earlier call of the same kind are in it."""
    partial = partial_of(out)
    places = [(model.ref.text, model.checkpoint.path) for model in models]
    places += [(model.ref.text, file.path) for model in models for file in model.checkpoint.files]
    check_out(out, force, places)
    partial.mkdir(parents=True, exist_ok=True)
    lock = take_lock(partial)
    try:
        (partial / WEIGHTS).unlink(missing_ok=True)  # killed just before the renaming
        files = [[file.path, file.size, file.mtime_ns] for model in models for file in model.checkpoint.files]
        yield Parts(partial / WEIGHTS, {"asked": asked, "files": files}, force)
    finally:
        lock.release()


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
        path = self.parts.path(_part(place))
        if self.parts.has(path.name):
            self.resumed += 1
            return _result_in(path)
        pair = target.pair
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
        _save(path, tensors, result)
        return result

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
            _save(self.parts.path(part), tensors, {})
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


def _save(path: Path, tensors: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    new = path.with_name(f"{path.name}.new")
    save_file(dict(tensors), new, {"result": json.dumps(result)})
    os.replace(new, path)


def _result_in(path: Path) -> dict[str, Any]:
    """What is kept of a module that was done before, in a file of this run's own."""
    from merge.checkpoint.safetensors_file import read_header

    result: dict[str, Any] = parse_json(read_header(str(path))[1]["result"])
    return result


def _torch_dtype(name: str) -> Any:
    import torch

    from merge.dtypes import torch_name

    return getattr(torch, torch_name(name))
