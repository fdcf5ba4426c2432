"""Which worker carries out which steps next. Plain bookkeeping: callers say what happened, and when.

A batch is given to one worker. What a lost worker had goes to the others. When nothing waits any more, an idle worker
repeats the batch that is out the longest: a step that is carried out twice gives the same bytes at the same place.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence

_STRAGGLES = 2.0  # times the median time of a batch, after which an idle worker repeats it
MOST_LOSSES = 5  # workers that a batch may take with it without one step done


class Scheduler:
    """Deals batches of step numbers to workers, which are known by their names.

    Args:
        batches: in the order in which to begin them; every step is in one of them.
    """

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._left = [dict.fromkeys(batch) for batch in batches]  # steps of each batch that are not done, in order
        self._batch_of = {step: number for number, batch in enumerate(batches) for step in batch}
        self._waiting = deque(range(len(batches)))
        self._out: dict[int, dict[str, float]] = {}  # batch -> when each worker that has it took it
        self._losses: Counter[int] = Counter()
        self._seconds: list[float] = []  # that batches took

    @property
    def finished(self) -> bool:
        return not any(self._left)

    def take(self, worker: str, now: float) -> tuple[int, ...]:
        """The steps that a worker without work should do next; none if there is nothing for it at this moment."""
        while self._waiting:
            batch = self._waiting.popleft()
            if self._left[batch]:
                return self._give(batch, worker, now)
        batch_of_straggler = self._straggler(worker, now)
        return () if batch_of_straggler is None else self._give(batch_of_straggler, worker, now)

    def done(self, step: int, now: float) -> bool:
        """Notes a finished step; False if another worker had finished it before."""
        batch = self._batch_of[step]
        if step not in self._left[batch]:
            return False
        del self._left[batch][step]
        self._losses[batch] = 0
        if not self._left[batch]:
            self._seconds.append(now - min(self._out.pop(batch, {"": now}).values()))
        return True

    def returned(self, worker: str) -> None:
        """A worker has no work any more: it finished, or it is lost. What it left undone waits again, in front."""
        for batch in [number for number, workers in self._out.items() if worker in workers]:
            del self._out[batch][worker]
            if not self._out[batch]:
                del self._out[batch]
                if self._left[batch]:
                    self._waiting.appendleft(batch)

    def lost(self, worker: str) -> int | None:
        """Like `returned`, of a worker that died; a step of the batch that MOST_LOSSES workers died of, if any."""
        had = [number for number, workers in self._out.items() if worker in workers and self._left[number]]
        self.returned(worker)
        self._losses.update(had)
        return next((next(iter(self._left[batch])) for batch in had if self._losses[batch] >= MOST_LOSSES), None)

    def _give(self, batch: int, worker: str, now: float) -> tuple[int, ...]:
        self._out.setdefault(batch, {})[worker] = now
        return tuple(self._left[batch])

    def _straggler(self, worker: str, now: float) -> int | None:
        if not self._seconds:
            return None
        slow = _STRAGGLES * statistics.median(self._seconds)
        alone = {
            next(iter(workers.values())): batch
            for batch, workers in self._out.items()
            if len(workers) == 1 and worker not in workers
        }
        first = min(alone, default=now)
        return alone[first] if now - first > slow else None
