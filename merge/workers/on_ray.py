"""Workers that are actors of a Ray cluster; extra `distributed`. They need the file system of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from merge.errors import MergeError, UsageError, first_line
from merge.needs import need
from merge.output.shared import OnDone
from merge.workers.assigned import AssignedSteps, Assignment
from merge.workers.pool import PATIENCE, WorkerLost

_LOOKS = 2.0  # seconds between looks at a worker


def connect(address: str | None) -> None:
    """Joins a cluster, or starts one on this machine where there is no address.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=False)
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        raise UsageError(f"--address {address}: no Ray cluster answers ({error}). Start one with ray start.") from error


def nodes() -> list[int]:
    """Processors of each living node."""
    alive = [node for node in _ray().nodes() if node["Alive"]]
    return [int(node["Resources"].get("CPU", 0)) for node in alive if node["Resources"].get("CPU", 0) >= 1]


class RayWorker:
    """See merge.workers.pool.RemoteWorker. Takes its threads' processors and its memory of one node."""

    def __init__(self, name: str, threads: int, max_ram: int | None, patience: float = PATIENCE) -> None:
        self._name, self._patience, self._ray = name, patience, _ray()
        # Two calls at a time: the work, and the question whether it is alive.
        options = {"num_cpus": threads, "max_restarts": 0, "max_concurrency": 2}
        self._actor = self._ray.remote(_Actor).options(**options, memory=max_ram or 0).remote()

    def start(self, assignment: Assignment) -> None:
        self._await(self._actor.start.remote(assignment.to_json()))

    def run(self, steps: Sequence[int], on_done: OnDone) -> None:
        for index, record in self._await(self._actor.run.remote(list(steps))):
            on_done(index, record)

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)

    def close(self) -> None:
        self.kill()

    def _await(self, call: Any) -> Any:
        """A call's result, while the worker shows that it is alive."""
        sign, seen = None, time.monotonic()
        try:
            while not self._ray.wait([call], timeout=_LOOKS)[0]:
                sign = sign or self._actor.is_alive.remote()
                if self._ray.wait([sign], timeout=0)[0]:
                    self._ray.get(sign)
                    sign, seen = None, time.monotonic()
                elif time.monotonic() - seen > self._patience:
                    raise WorkerLost(f"{self._name} gave no sign of life for {self._patience:.0f} s")
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (
                cause
                if isinstance(cause, MergeError)
                else MergeError(f"{self._name}: {type(cause).__name__}: {first_line(cause)}")
            ) from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"{self._name} is lost ({type(error).__name__})") from error


class _Actor:
    """In the worker's process."""

    def __init__(self) -> None:
        self._records: list[tuple[int, Mapping[str, object]]] = []
        self._lock = threading.Lock()
        self._assigned: AssignedSteps | None = None

    def start(self, assignment: str) -> None:
        self._assigned = AssignedSteps(Assignment.from_json(assignment), self._done).__enter__()

    def run(self, steps: list[int]) -> list[tuple[int, Mapping[str, object]]]:
        assert self._assigned is not None
        self._assigned.run(steps)
        with self._lock:
            records, self._records = self._records, []
        return records

    def is_alive(self) -> bool:
        return True

    def _done(self, index: int, record: Mapping[str, object]) -> None:
        with self._lock:
            self._records.append((index, record))


def _ray() -> Any:
    need("--workers ray", "distributed", "ray")
    import ray

    return ray
