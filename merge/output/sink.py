"""Sink: receives the tensors of a run. Either a directory (merge/output/writer.py) or memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from merge.dtypes import DTYPES
from merge.errors import StaleWork
from merge.plan import Plan, Step

if TYPE_CHECKING:
    from torch import Tensor


class Sink(Protocol):
    """The interface between engine and output; methods may be called from any thread.

    Attributes:
        records: of finished tensors, by step; notes: other results that survive a kill.
        finished: the report of a run like this one that was carried out before; nothing is left to do.
        changed: source files that may not be what they were when records and notes were made.
    """

    plan: Plan
    records: dict[int, dict[str, Any]]
    notes: dict[str, Any]
    finished: dict[str, Any] | None
    changed: frozenset[str]

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the tensors take in it."""

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Writes encoded elements of a step, starting at `element`."""

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        """Reads back what was written."""

    def finish(self, index: int, record: dict[str, object]) -> None:
        """A step's tensor is whole."""

    def keep(self, name: str, value: object) -> None:
        """Keeps a result that is not a tensor."""

    def prove(self) -> None:
        """Records that all earlier work fits the present source files."""

    def stale(self, what: str) -> StaleWork:
        """The error for earlier work that does not fit them."""

    def flushing(self) -> contextlib.AbstractContextManager[None]:
        """Around the steps."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around tiny steps that one thread does: what they give may wait until all are done."""

    def complete(
        self, small_files: Mapping[str, bytes], manifest: tuple[str, bytes], report: Mapping[str, object]
    ) -> None:
        """Ends the run once all tensors are complete; `files` are written with them."""


class MemorySink:
    """Keeps the result in memory, for a model that is used in the same process: `run_plan(plan, MemorySink(plan))`.

    Attributes:
        files: contents of the small files, by name: config.json, tokenizer, merge_manifest.json.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.records: dict[int, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self.finished: dict[str, Any] | None = None
        self.changed: frozenset[str] = frozenset()
        self.files: dict[str, bytes] = {}
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "memory"

    @property
    def held_bytes(self) -> int:
        return sum(step.nbytes for step in self.plan.steps)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor in its dtype, by name; they share the sink's memory."""
        import torch

        found = {}
        for step in self.plan.steps:
            dtype = getattr(torch, DTYPES[step.dtype].torch_name)
            found[step.name] = torch.from_numpy(self._of(step)).view(dtype).view(step.shape)
        return found

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        view = data.cast("B")
        self._of(step)[element * itemsize : element * itemsize + view.nbytes] = view

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        view = data.cast("B")
        view[:] = self._of(step)[element * itemsize : element * itemsize + view.nbytes].data

    def _of(self, step: Step) -> npt.NDArray[np.uint8]:
        with self._lock:
            if step.name not in self._bytes:
                self._bytes[step.name] = np.empty(step.nbytes, np.uint8)
            return self._bytes[step.name]

    def finish(self, index: int, record: dict[str, object]) -> None:
        self.records[index] = {"step": index, **record}

    def keep(self, name: str, value: object) -> None:
        self.notes[name] = value

    def prove(self) -> None:
        pass

    def stale(self, what: str) -> StaleWork:
        return StaleWork(what)

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        yield

    def complete(
        self, small_files: Mapping[str, bytes], manifest: tuple[str, bytes], report: Mapping[str, object]
    ) -> None:
        self.files = {**small_files, manifest[0]: manifest[1]}
        self.finished = dict(report)
