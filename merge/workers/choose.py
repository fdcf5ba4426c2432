"""What `--workers` names: threads, processes:N, ray or ray:N."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merge.engine.carry import Carry, by_threads
from merge.errors import UsageError
from merge.processors import processors
from merge.workers.pool import Pool

MOST = 10_000


def chosen_workers(
    text: str,
    *,
    address: str | None = None,
    threads: int | None = None,
    max_ram: int | None = None,
    method_files: Sequence[Path] = (),
) -> Carry:
    """
    Args:
        text: "threads", "processes:N", "ray" (one worker on each node) or "ray:N".
        address: of a Ray cluster; by default that of the environment, or a new one on this machine.
        threads, max_ram: of each worker. By default a process has its share of the processors, and a worker of Ray
            all those of the smallest node (its share of a node, where there are more workers than nodes).
        method_files: of user's methods.

    Raises:
        UsageError: no such workers.
    """
    match = re.fullmatch(r"(threads|processes|ray)(?::(\d{1,6}))?", text)
    kind, number = (match[1], int(match[2]) if match[2] else None) if match else ("", None)
    if (
        not kind
        or number == 0
        or (number or 1) > MOST
        or (kind == "threads" and number)
        or (kind == "processes" and number is None)
    ):
        raise UsageError(f'--workers "{text}": expected threads, processes:N, ray or ray:N, with N from 1 to {MOST:,}.')
    if address is not None and kind != "ray":
        raise UsageError("--address: only with --workers ray.")
    if kind == "threads":
        return by_threads
    if kind == "processes":
        from merge.workers.processes import ProcessWorker

        assert number is not None
        own = threads or max(1, processors() // number)
        return Pool(ProcessWorker, number, threads=own, max_ram=max_ram, method_files=method_files)
    return _on_ray(number, address, threads, max_ram, method_files)


def _on_ray(
    number: int | None, address: str | None, threads: int | None, max_ram: int | None, method_files: Sequence[Path]
) -> Carry:
    from merge.workers import on_ray

    on_ray.connect(address)
    cpus = on_ray.nodes()
    if not cpus:
        raise UsageError("--workers ray: the cluster has no node with a processor.")
    n = number or len(cpus)
    own = threads or max(1, min(cpus) // -(-n // len(cpus)))
    if own > max(cpus):
        raise UsageError(f"--threads {own}: the largest node of the cluster has {max(cpus)} processors.")
    make = lambda name: on_ray.RayWorker(name, own, max_ram)  # noqa: E731
    return Pool(make, n, threads=own, max_ram=max_ram, durable=True, method_files=method_files)
