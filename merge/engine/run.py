"""run_plan: the engine. Reads blocks, lets the method combine them, rounds once, writes at the final offset.

Everything that could be wrong with the recipe was found when the plan was made; what can go wrong here is the machine.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.checkpoint.reader import SourceReader
from merge.codec import decode
from merge.engine import factors, memory
from merge.engine.carry import EXECUTORS, Carry, Ticker, by_threads
from merge.engine.context import Context, check_method
from merge.engine.costs import Budget
from merge.engine.crew import Crew, Worker
from merge.engine.find import find_all
from merge.engine.preflight import check_models
from merge.engine.reproducible import conditions
from merge.engine.resume import check_sources, still_good
from merge.engine.space import check_space
from merge.garbage import kept_apart
from merge.output.identity import source_files
from merge.output.manifest import MANIFEST, manifest_bytes, side_file_bytes
from merge.output.sink import Sink
from merge.output.workspace import resume
from merge.output.writer import OutputDirectory
from merge.plan import Plan

Progress = Callable[[int], None]  # bytes of output finished so far, including resumed ones


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
    aligned: tuple[dict[str, Any], ...] = ()  # units moved, by model and kind of module
    adapter: dict[str, Any] | None = None  # share of the energy that truncated factors keep, where any are
    quantised: tuple[dict[str, Any], ...] = ()  # task vectors beside what rounding makes of them; see check_models


def run_plan(
    plan: Plan,
    out: str | os.PathLike[str] | Sink,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda done: None,
    block_chunks: int | None = None,
    last: Callable[[], None] = lambda: None,
    workers: Callable[[int], Worker] = Crew,
    carry: Carry = by_threads,
) -> Report:
    """Carries out a plan.

    Args:
        out: directory to make, or another sink; `out`.partial holds unfinished work, which the same call resumes.
        threads: worker threads; all processors by default.
        max_ram: bytes of resident memory to stay within; see merge.engine.memory.
        device: "cpu" or a torch device such as "cuda".
        force: replace an existing `out`, and discard unfinished work of another plan.
        block_chunks: chunks a thread reads at once; chosen from max_ram by default. Never changes the result.
        last: removes what was made for this run only, once `out` is there.
        workers: (number of threads) -> the threads of this process.
        carry: who carries out the steps; see merge.workers for other processes and machines.

    Raises:
        MergeError: see merge.errors; `out`.partial stays and nothing else is touched.
    """
    check_method(plan)
    held = 0 if isinstance(out, str | os.PathLike) else out.held_bytes
    budget = memory.budget(plan, threads, max_ram, device, block_chunks, held)
    memory.check_address_space(plan, budget, device)
    small_files = side_file_bytes(plan)

    def run(sink: Sink) -> Report:
        return _run(sink, workers(budget.threads), carry, device, small_files, budget, progress)

    if not isinstance(out, str | os.PathLike):
        return run(out)
    path = Path(out)
    check_space(plan, path)

    def work(fresh: bool) -> Report:
        with OutputDirectory(plan, path, force, device, fresh=fresh, last=last) as directory:
            return run(directory)

    return resume(work, force)


def _run(
    sink: Sink,
    worker: Worker,
    carry: Carry,
    device: str,
    small_files: dict[str, bytes],
    budget: Budget,
    progress: Progress,
) -> Report:
    began = time.monotonic()
    if sink.finished is not None:
        return decode(sink.finished, Report)
    plan = sink.plan
    with kept_apart(), SourceReader(source_files(plan)) as reader:
        context = Context(plan, reader, worker, sink, device, budget)
        tick = Ticker(context, progress)
        find_all(context, tick, before_checks=True)
        for stage in plan.stages:
            if stage.steps:  # streamed
                check_models(Context(stage, reader, worker, sink, device, budget))
        quantised = check_models(context)
        resumed = still_good(context, tick)
        with sink.flushing():
            find_all(context, tick, before_checks=False)
            check_sources(context, lambda step: EXECUTORS[step.kind].sources(context, step), tick)
            sink.prove()
            todo = [(i, step) for i, step in enumerate(plan.steps) if i not in sink.records]
            carry(context, todo, tick)
        reader.check_unchanged()
    kinds = dict.fromkeys(type(finding) for finding in plan.findings)
    aligned = [entry for kind in kinds for entry in kind.summary(plan, sink.notes)]
    adapter = factors.summary(plan.steps, sink.records)
    report = Report(
        out=sink.name,
        seconds=time.monotonic() - began,
        bytes_read=sum(step.bytes_read for _, step in todo),
        bytes_written=plan.bytes_written,
        resumed_tensors=resumed,
        tensors=len(plan.steps),
        peak_memory=memory.peak_resident(),
        nonfinite=sum(record.get("nonfinite", 0) for record in sink.records.values()),
        overflow=sum(record.get("overflow", 0) for record in sink.records.values()),
        aligned=tuple(aligned),
        adapter=adapter,
        quantised=tuple(quantised),
    )
    manifest = manifest_bytes(plan, sink.records, small_files, aligned, adapter, conditions(plan, device))
    sink.complete(small_files, (MANIFEST, manifest), dataclasses.asdict(report))
    return report
