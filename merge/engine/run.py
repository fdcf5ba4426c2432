"""run_plan: the engine. Reads blocks, lets the method combine them, rounds once, writes at the final offset.

Everything that could be wrong with the recipe was found when the plan was made; what can go wrong here is the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.checkpoint.reader import SourceReader
from merge.engine import memory
from merge.engine.crew import Crew
from merge.engine.executors import Context, executor, method_of
from merge.engine.preflight import check_models
from merge.engine.resume import still_good
from merge.engine.space import check_space
from merge.errors import NumbersError
from merge.output.manifest import MANIFEST, manifest_bytes, side_file_bytes
from merge.output.writer import OutputDirectory
from merge.plan import Plan, Step

Progress = Callable[[int], None]  # bytes of output done so far, resumed ones included


@dataclass(frozen=True)
class Report:
    """What a run did."""

    out: str
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed_tensors: int
    tensors: int
    peak_memory: int  # bytes, resident; 0 where the system does not say
    nonfinite: int
    overflow: int


def run_plan(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda done: None,
    block_chunks: int | None = None,
) -> Report:
    """Carries out a plan.

    Args:
        out: directory to make; `out`.partial holds unfinished work, which the same call goes on with.
        threads: worker threads; all processors by default.
        max_ram: bytes of resident memory to stay within; see merge.engine.memory.
        device: "cpu" or a torch device such as "cuda".
        force: replace an existing `out`, and discard unfinished work of another plan.
        block_chunks: chunks a thread reads at once; chosen from max_ram by default. Never changes the result.

    Raises:
        MergeError: see merge.errors; `out`.partial stays and nothing else is touched.
    """
    began = time.monotonic()
    budget = memory.budget(plan, threads, max_ram, device, block_chunks)
    check_space(plan, Path(out))
    small_files = side_file_bytes(plan)
    files = [file for model in plan.models for file in model.files]
    with SourceReader(files) as reader, OutputDirectory(plan, Path(out), force) as directory:
        crew = Crew(budget.threads)
        context = Context(plan, reader, crew, directory, device, budget)
        tick = _ticker(context, progress)
        check_models(context)
        resumed = still_good(context, tick)
        todo = [(i, step) for i, step in enumerate(plan.steps) if i not in directory.records]
        with directory.flushing():
            _model_passes(context, tick)
            crew.each(lambda item: _run_step(context, *item), _largest_first(todo), tick)
        reader.check_unchanged()
        nonfinite, overflow = _check_numbers(context)
        directory.complete(small_files, (MANIFEST, manifest_bytes(plan, directory.records, small_files)))
    return Report(
        out=str(out),
        seconds=time.monotonic() - began,
        bytes_read=sum(source.nbytes for _, step in todo for source in step.sources),
        bytes_written=plan.bytes_written,
        resumed_tensors=resumed,
        tensors=len(plan.steps),
        peak_memory=memory.peak_resident(),
        nonfinite=nonfinite,
        overflow=overflow,
    )


def _run_step(context: Context, index: int, step: Step) -> None:
    record = executor(step, context.device)(context, index, step)
    _check_step(context.plan, step, record)
    context.out.finish(index, record)


def _largest_first(todo: list[tuple[int, Step]]) -> list[tuple[int, Step]]:
    """The giants (embeddings, heads) first: the last tensor of a run should not keep one thread busy alone."""
    giant = max((step.nbytes for _, step in todo), default=0) // 2
    return sorted(todo, key=lambda item: item[1].nbytes < giant)


def _model_passes(context: Context, tick: Callable[[], None]) -> None:
    """Statistics over whole models that some methods need first; journaled, so that a resume does not repeat them."""
    names = sorted({step.method for step in context.plan.steps if step.method != "copy"})
    for name in names:
        steps = [(i, step) for i, step in enumerate(context.plan.steps) if step.method == name]
        model_pass = method_of(steps[0][1]).load_model_pass()
        if model_pass is not None:
            context.private.update(model_pass(context, steps, tick))


def _ticker(context: Context, progress: Progress) -> Callable[[], None]:
    steps = context.plan.steps
    return lambda: progress(sum(steps[i].nbytes for i in list(context.out.records)))


def _check_step(plan: Plan, step: Step, record: dict[str, Any]) -> None:
    """Bad numbers end the run at the tensor where they appear, unless the recipe allows them."""
    if "nonfinite_in" in record and "nonfinite" not in plan.allow:
        models = [plan.models[i].ref for i in _source_models(step)]
        found = ", ".join(f"{n:,} in {model}" for model, n in zip(models, record["nonfinite_in"], strict=True) if n)
        raise NumbersError(
            f'{step.name}: NaN or infinite values in the input: {found}. Set "allow: [nonfinite]" to merge them.'
        )
    if "overflow" in record and "overflow" not in plan.allow:
        raise NumbersError(
            f"{step.name}: {record['overflow']:,} values (largest {record['absmax']:.6g}) do not fit {step.dtype}. "
            'Choose another dtype, or set "allow: [overflow]" to let them become infinite.'
        )
    if "nonfinite" in record and "nonfinite" not in plan.allow:
        raise NumbersError(
            f"{step.name}: the merge gives {record['nonfinite']:,} NaN or infinite values from finite inputs. "
            'Look at its weights, or set "allow: [nonfinite]".'
        )


def _source_models(step: Step) -> tuple[int, ...]:
    return step.models if step.base_model is None or step.base is None else (step.base_model, *step.models)


def _check_numbers(context: Context) -> tuple[int, int]:
    records = context.out.records.values()
    return sum(r.get("nonfinite", 0) for r in records), sum(r.get("overflow", 0) for r in records)
