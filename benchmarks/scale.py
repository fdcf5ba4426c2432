"""Large merges on paper: bytes, time at a rate that was measured, and a simulation of many workers.

    python benchmarks/scale.py [--rate 300] [--nodes 1 8 100] [--runs 5]

The table says what TIES of a base and three fine-tunes takes on nodes that each read and write `--rate` MB/s; the last
line of `merge run` says what a node does. The simulation deals the steps of such a plan to 100 workers by the scheduler
that runs use (merge.workers.scheduler): speeds vary, some workers are ten times slower, some die, which is noticed a
minute later. It compares the time with that of work spread perfectly over workers that never fail.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from merge.workers.pool import PATIENCE, batches_for
from merge.workers.scheduler import Scheduler

MODELS = 4  # read, with the base
_START = 20.0  # seconds until a new worker has imported and planned
_POLL = 0.5  # seconds between two questions of an idle worker


@dataclass(frozen=True)
class Shape:
    """A decoder: `expert` is the width of each of `experts`, 0 experts is a dense one."""

    name: str
    layers: int
    hidden: int
    kv: int
    inner: int
    vocabulary: int
    experts: int = 0
    expert: int = 0


SHAPES = (
    Shape("Llama 70B", 80, 8192, 1024, 28672, 128256),
    Shape("Llama 405B", 126, 16384, 1024, 53248, 128256),
    Shape("DeepSeek 671B", 61, 7168, 7168, 18432, 129280, 256, 2048),
)


@dataclass(frozen=True)
class PaperStep:
    """What the dealer of batches asks of a step."""

    nbytes: int
    factor: str = ""


def steps(shape: Shape) -> Iterator[PaperStep]:
    """Tensors in bfloat16, without biases and norms."""
    yield PaperStep(2 * shape.vocabulary * shape.hidden)
    yield PaperStep(2 * shape.vocabulary * shape.hidden)
    for layer in range(shape.layers):
        for columns in (shape.hidden, shape.hidden, shape.kv, shape.kv):
            yield PaperStep(2 * columns * shape.hidden)
        sparse = shape.experts and layer >= 3
        for _ in range(3 * (shape.experts + 1) if sparse else 3):
            yield PaperStep(2 * shape.hidden * (shape.expert if sparse else shape.inner))


def simulate(shape: Shape, workers: int, rate: float, deaths: int, slow: int, seed: int) -> tuple[float, float, float]:
    """(seconds, seconds if it were spread perfectly, share of bytes done more than once)"""
    chance = random.Random(seed)
    plan = list(steps(shape))
    scheduler = Scheduler([[i for i, _ in batch] for batch in batches_for(list(enumerate(plan)), workers)])  # type: ignore[arg-type]
    whole = sum(step.nbytes for step in plan) * (MODELS + 1)
    speeds = {f"{i}": rate * chance.lognormvariate(0, 0.15) * (0.1 if i < slow else 1) for i in range(workers)}
    fast = whole / sum(speeds.values())
    order = itertools.count()
    events: list[tuple[float, int, str, str, int]] = []

    def at(time: float, kind: str, worker: str, step: int = -1) -> None:
        heapq.heappush(events, (time, next(order), kind, worker, step))

    for worker in speeds:
        at(_START, "idle", worker)
    for worker in chance.sample(sorted(speeds), deaths):
        at(_START + chance.uniform(0, fast), "dies", worker)
    dead: set[str] = set()
    done_bytes, now = 0, 0.0
    while not scheduler.finished:
        now, _, kind, worker, step = heapq.heappop(events)
        if kind == "dies":
            dead.add(worker)
            at(now + PATIENCE, "noticed", worker)
        elif kind == "noticed":
            scheduler.lost(worker)
            speeds[f"{worker}+"] = rate
            at(now + _START, "idle", f"{worker}+")
        elif worker in dead:
            continue
        elif kind == "done":
            done_bytes += plan[step].nbytes
            scheduler.done(step, now)
        else:
            scheduler.returned(worker)
            time = now
            for i in scheduler.take(worker, now):
                time += plan[i].nbytes * (MODELS + 1) / speeds[worker]
                at(time, "done", worker, i)
            at(time if time > now else now + _POLL, "idle", worker)
    return now - _START, fast, done_bytes * (MODELS + 1) / whole - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=300, help="MB/s read and written by one node")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 100])
    parser.add_argument("--runs", type=int, default=5, help="simulations of each")
    arguments = parser.parse_args()
    rate = arguments.rate * 1e6
    print("| model | tensors | read, GB | written, GB |" + "".join(f" {n} nodes, min |" for n in arguments.nodes))
    print("|---|---:|---:|---:|" + "---:|" * len(arguments.nodes))
    for shape in SHAPES:
        plan = list(steps(shape))
        size = sum(step.nbytes for step in plan)
        times = [f"{size * (MODELS + 1) / rate / n / 60:,.1f}" for n in arguments.nodes]
        print(
            f"| {shape.name} | {len(plan):,} | {MODELS * size / 1e9:,.0f} | {size / 1e9:,.0f} | {' | '.join(times)} |"
        )
    print(
        "\n| model, 100 workers | dead | slow | minutes | of the perfect | done twice |\n|---|---:|---:|---:|---:|---:|"
    )
    for shape in SHAPES:
        for deaths, slow in ((0, 0), (10, 0), (0, 5), (10, 5)):
            found = [simulate(shape, 100, rate, deaths, slow, seed) for seed in range(arguments.runs)]
            seconds, perfect, twice = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {shape.name} | {deaths} | {slow} | {seconds / 60:.1f} | {seconds / perfect:.2f} | {twice:.1%} |")


if __name__ == "__main__":
    main()
