"""Workers and slices: whoever carries out a step, and whatever dies, the result has the same bytes."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from conftest import Output

from merge import build_plan, load_recipe, run_plan
from merge.engine.order import in_order
from merge.errors import MergeError, NumbersError, OutputError
from merge.plan import Plan
from merge.workers.assigned import AssignedSteps, Assignment
from merge.workers.pool import Pool, WorkerLost, batches_for
from merge.workers.processes import ProcessWorker
from merge.workers.scheduler import MOST_LOSSES, Scheduler
from merge.workers.slices import run_slice, slice_of

RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.7, density: 0.4}
  - model: b
    parameters: {weight: -0.4, density: 0.6}
parameters: {trim: model}
"""


@pytest.fixture
def plan(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a recipe with relative paths and a finding: thresholds over whole models."""
    make_model(tmp_path / "base", hidden=64, layers=4, dtype="BF16")
    for seed, name in enumerate("ab", 1):
        make_model(tmp_path / name, hidden=64, layers=4, dtype="BF16", base=tmp_path / "base", delta=0.002, seed=seed)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return build_plan(load_recipe("recipe.yaml"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class WorkerInThread:
    """A worker of this process, which dies where a test wants it to."""

    def __init__(self, name: str, dies: Callable[[], bool] = lambda: False) -> None:
        self.name, self._dies = name, dies
        self.steps: list[int] = []

    def start(self, assignment: Assignment) -> None:
        self._assigned = AssignedSteps(assignment, self._done)
        self._assigned.__enter__()

    def run(self, steps: Sequence[int], on_done: Callable[[int, Mapping[str, object]], None]) -> None:
        self._on_done = on_done
        self._assigned.run(steps)

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self._assigned.__exit__(None, None, None)

    def _done(self, index: int, record: Mapping[str, object]) -> None:
        if self._dies():
            raise WorkerLost(f"{self.name} died")
        self.steps.append(index)
        self._on_done(index, record)


# The scheduler


def test_every_step_is_given_once_while_nothing_goes_wrong() -> None:
    scheduler = Scheduler([[0, 1], [2], [3, 4, 5]])
    given = []
    for worker in ("a", "b", "a"):
        steps = scheduler.take(worker, 0.0)
        given += steps
        assert all(scheduler.done(step, 1.0) for step in steps)
        scheduler.returned(worker)
    assert given == list(range(6))
    assert scheduler.finished
    assert scheduler.take("a", 2.0) == ()


def test_what_a_lost_worker_left_goes_to_the_next() -> None:
    scheduler = Scheduler([[0, 1, 2], [3]])
    assert scheduler.take("a", 0.0) == (0, 1, 2)
    scheduler.done(0, 1.0)
    assert scheduler.lost("a") is None
    assert scheduler.take("b", 2.0) == (1, 2)


def test_an_idle_worker_repeats_the_batch_that_takes_much_longer_than_others() -> None:
    scheduler = Scheduler([[0], [1], [2]])
    for worker, now in (("a", 0.0), ("b", 1.0), ("c", 0.5)):
        scheduler.take(worker, now)
    scheduler.done(1, 2.0)
    scheduler.returned("b")
    assert scheduler.take("b", 2.0) == ()  # nobody is late yet
    assert scheduler.take("b", 5.0) == (0,)
    assert scheduler.take("d", 5.0) == (2,)
    assert scheduler.take("e", 9.0) == ()  # two are at each
    assert scheduler.done(0, 9.0)
    assert not scheduler.done(0, 9.1)


def test_a_step_that_workers_die_of_is_named() -> None:
    scheduler = Scheduler([[7, 8]])
    found = []
    for attempt in range(MOST_LOSSES):
        scheduler.take(str(attempt), 0.0)
        found.append(scheduler.lost(str(attempt)))
    assert found == [None] * (MOST_LOSSES - 1) + [7]


def test_batches_hold_every_step_once_and_both_factors_of_a_module(plan: Plan) -> None:
    ordered, _ = in_order(list(enumerate(plan.steps)), "cpu")
    batches = list(batches_for(ordered, 3))
    assert [item for batch in batches for item in batch] == ordered
    assert len(batches) >= 3


# Workers


def test_workers_give_the_bytes_of_threads(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan, tmp_path / "threads")
    made: list[WorkerInThread] = []

    def make(name: str) -> WorkerInThread:
        made.append(WorkerInThread(name))
        return made[-1]

    run_plan(plan, tmp_path / "workers", carry=Pool(make, 3, threads=1))
    assert contents(tmp_path / "workers") == contents(tmp_path / "threads")
    assert sum(len(worker.steps) for worker in made) >= len(plan.steps)


@pytest.mark.parametrize("seed", range(4))
def test_workers_that_die_change_nothing(plan: Plan, tmp_path: Path, seed: int) -> None:
    run_plan(plan, tmp_path / "threads")
    chance = random.Random(seed)
    report = run_plan(
        plan,
        tmp_path / "workers",
        carry=Pool(lambda name: WorkerInThread(name, lambda: chance.random() < 0.15), 3, threads=1),
    )
    assert report.tensors == len(plan.steps)
    assert contents(tmp_path / "workers") == contents(tmp_path / "threads")


def test_workers_that_cannot_live_end_the_run_and_threads_resume_it(plan: Plan, tmp_path: Path) -> None:
    alive = iter([True] * 5)
    with pytest.raises(MergeError, match=r"worker \d+ died|workers died at it"):
        run_plan(
            plan,
            tmp_path / "out",
            carry=Pool(lambda name: WorkerInThread(name, lambda: not next(alive, False)), 2, threads=1),
        )
    assert run_plan(plan, tmp_path / "out").resumed_tensors == 5
    run_plan(plan, tmp_path / "threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "threads")


def test_one_workers_full_disk_is_left_to_the_others(plan: Plan, tmp_path: Path) -> None:
    class Full(WorkerInThread):
        def run(self, steps: Sequence[int], on_done: Callable[[int, Mapping[str, object]], None]) -> None:
            raise OutputError("the disk is full")

    run_plan(
        plan,
        tmp_path / "out",
        carry=Pool(lambda name: (Full if name == "worker 1" else WorkerInThread)(name), 2, threads=1),
    )
    run_plan(plan, tmp_path / "threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "threads")
    with pytest.raises(MergeError, match="no worker is left: the disk is full"):
        run_plan(plan, tmp_path / "none", carry=Pool(Full, 2, threads=1))


def test_processes_give_the_bytes_of_threads_though_one_is_killed_and_one_stopped(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan, tmp_path / "threads")
    fates = {"worker 1": signal.SIGKILL, "worker 2": signal.SIGSTOP}

    class Doomed(ProcessWorker):
        def run(self, steps: Sequence[int], on_done: Callable[[int, Mapping[str, object]], None]) -> None:
            if self._name in fates:
                os.kill(self.pid, fates[self._name])
            super().run(steps, on_done)

    run_plan(plan, tmp_path / "processes", carry=Pool(lambda name: Doomed(name, patience=8), 2, threads=1))
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")


def test_the_error_of_a_step_in_another_process_is_the_runs_own(
    plan: Plan, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    import numpy as np

    poison = np.full((64,), np.nan, np.float32)
    make_model(tmp_path / "b", hidden=64, layers=4, extra={"model.layers.3.post_attention_layernorm.weight": poison})
    Path("linear.yaml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    plan = build_plan(load_recipe("linear.yaml"))
    with pytest.raises(NumbersError) as by_threads:
        run_plan(plan, tmp_path / "out")
    assert len(list((tmp_path / "out.partial" / "result").iterdir())) == 1  # a step failed, not a check before
    with pytest.raises(NumbersError) as by_processes:
        run_plan(plan, tmp_path / "out", force=True, carry=Pool(ProcessWorker, 1, threads=1))
    assert str(by_processes.value) == str(by_threads.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "processes"], '--workers "processes": expected threads, processes:N, ray or ray:N'),
        (["--workers", "processes:0"], '--workers "processes:0": expected'),
        (["--workers", "threads", "--address", "auto"], "--address: only with --workers ray."),
        (["--slice", "3/2"], "--slice 3/2: expected 1/2 to 2/2."),
        (["--slice", "half"], '--slice "half": expected I/N'),
        (["--slice", "1/2", "--workers", "processes:2"], "--slice: cannot be combined with --workers."),
    ],
)
def test_wrong_workers_are_usage_errors(
    plan: Plan, call_cli: Callable[..., Output], flags: list[str], message: str, tmp_path: Path
) -> None:
    done = call_cli(["run", "recipe.yaml", "-o", "out", *flags], cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "out.partial").exists()


# Slices


def test_slices_in_any_order_and_a_run_give_the_bytes_of_a_run(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan, tmp_path / "whole")
    reports = [run_slice(plan, tmp_path / "out", number, 3) for number in (3, 1, 2, 3)]
    assert sum(report.tensors for report in reports[:3]) == len(plan.steps)
    report = run_plan(plan, tmp_path / "out")
    assert report.resumed_tensors == len(plan.steps)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_does_what_slices_left(plan: Plan, tmp_path: Path) -> None:
    run_plan(plan, tmp_path / "whole")
    done = run_slice(plan, tmp_path / "out", 2, 3)
    assert run_plan(plan, tmp_path / "out").resumed_tensors == done.tensors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_slice_of_other_sources_is_not_taken(plan: Plan, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    run_slice(plan, tmp_path / "out", 1, 2)
    make_model(tmp_path / "b", hidden=64, layers=4, dtype="BF16", base=tmp_path / "base", delta=0.002, seed=9)
    again = build_plan(load_recipe("recipe.yaml"))
    run_plan(again, tmp_path / "whole")
    run_plan(again, tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_slices_divide_the_bytes_evenly(plan: Plan) -> None:
    items = list(enumerate(plan.steps))
    slices = [slice_of(items, number, 4) for number in range(1, 5)]
    assert sorted(item[0] for part in slices for item in part) == list(range(len(plan.steps)))
    sizes = [sum(step.nbytes for _, step in part) for part in slices]
    assert max(sizes) - min(sizes) <= max(step.nbytes for step in plan.steps)


def test_a_run_waits_for_no_slice_that_is_being_done(plan: Plan, tmp_path: Path) -> None:
    import filelock

    run_slice(plan, tmp_path / "out", 1, 2)
    with (
        filelock.FileLock(tmp_path / "out.partial" / "slice-1-of-2.lock"),
        pytest.raises(OutputError, match="is being written by another run"),
    ):
        run_plan(plan, tmp_path / "out")
    run_plan(plan, tmp_path / "out")


# Campaigns


@pytest.mark.full
def test_workers_and_the_run_are_killed_at_random_moments(plan: Plan, tmp_path: Path) -> None:
    """kill -9 of a worker 50 times and of the run 10 times; each time the same bytes."""
    run_plan(plan, tmp_path / "threads")
    expected = contents(tmp_path / "threads")
    chance = random.Random(1)
    for attempt in range(50):
        kill_a_worker_after(plan, tmp_path / f"worker-{attempt}", chance.uniform(0.0, 4.0))
        assert contents(tmp_path / f"worker-{attempt}") == expected
    for attempt in range(10):
        command = [sys.executable, "-m", "merge", "run", "recipe.yaml", "-o", "out", "--workers", "processes:2"]
        process = subprocess.Popen(command, stdout=-1, stderr=-1, start_new_session=True)
        time.sleep(chance.uniform(0.5, 8.0))
        process.kill()
        process.communicate()
        subprocess.run(command, check=True, capture_output=True)
        assert contents(tmp_path / "out") == expected, attempt
        subprocess.run(["rm", "-r", "out"], check=True)


def kill_a_worker_after(plan: Plan, out: Path, seconds: float) -> None:
    timers: list[threading.Timer] = []

    def make(name: str) -> ProcessWorker:
        worker = ProcessWorker(name)
        if not timers:
            timers.append(threading.Timer(seconds, worker.kill))
            timers[0].start()
        return worker

    run_plan(plan, out, carry=Pool(make, 2, threads=1))
    timers[0].cancel()
    timers[0].join()


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray: the extra distributed")
def test_two_nodes_of_ray_give_the_bytes_of_threads(plan: Plan, tmp_path: Path) -> None:
    """One node joins before the run; one of its workers is killed meanwhile."""
    script = tmp_path / "on_ray.py"
    script.write_text(ON_RAY)
    run_plan(plan, tmp_path / "threads")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")
    assert "2 nodes" in done.stdout


ON_RAY = """\
import ray
from ray.cluster_utils import Cluster

from merge import build_plan, load_recipe, run_plan
from merge.workers.choose import chosen_workers
from merge.workers.on_ray import RayWorker, nodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
print(len(nodes()), "nodes")
killed = []
run = RayWorker.run


def run_and_die(self, steps, on_done):
    if not killed:
        killed.append(self)
        ray.kill(self._actor)
    run(self, steps, on_done)


RayWorker.run = run_and_die
run_plan(build_plan(load_recipe("recipe.yaml")), "ray", carry=chosen_workers("ray"))
assert killed
"""
