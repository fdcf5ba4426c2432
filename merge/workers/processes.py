"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from merge import errors
from merge.jsontext import parse_json
from merge.output.shared import OnDone
from merge.workers.assigned import Assignment
from merge.workers.pool import PATIENCE, WorkerLost


class ProcessWorker:
    """See merge.workers.pool.RemoteWorker."""

    def __init__(self, name: str, patience: float = PATIENCE) -> None:
        self._name, self._patience = name, patience
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "merge.workers.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, assignment: Assignment) -> None:
        self._ask(assignment.to_json())
        self._await(lambda index, record: None)

    def run(self, steps: Sequence[int], on_done: OnDone) -> None:
        self._ask(json.dumps(steps))
        self._await(on_done)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # of what could not be sent any more
                file.close()  # type: ignore[union-attr]

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerLost(self._end()) from None

    def _await(self, on_done: OnDone) -> None:
        while True:
            try:
                answer = self._answers.get(timeout=self._patience)
            except queue.Empty:
                raise WorkerLost(f"{self._name} gave no sign of life for {self._patience:.0f} s") from None
            if answer is None:
                raise WorkerLost(self._end())
            if "step" in answer:
                on_done(answer["step"], answer["record"])
            elif "error" in answer:
                raise _error(answer["error"], answer["message"])
            elif "done" in answer:
                return

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._answers.put(dict(parse_json(line)))
            except (ValueError, TypeError):  # cut short by a kill
                break
        self._answers.put(None)

    def _end(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{self._name} {how}" + (f" ({lines[-1]})" if lines else "")


def _error(kind: str, message: str) -> errors.MergeError:
    """The error of a worker, as this process raises it."""
    found = getattr(errors, kind, errors.MergeError)
    made: errors.MergeError = found(message) if isinstance(found, type) else errors.MergeError(message)
    return made
