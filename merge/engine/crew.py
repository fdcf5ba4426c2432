"""Worker threads: each takes one step at a time; when no steps are left, they help each other with blocks.

With one tensor a thread, no thread waits between the passes of a method. Because idle threads help, a single giant
tensor, or the last one of a run, still uses every core.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from merge.errors import MergeError

T = TypeVar("T")
S = TypeVar("S")
# Seconds that a failed run waits for its other threads: one may wait for a lock that the failed thread holds.
PATIENCE = 60.0


class Stopped(Exception):
    """Raised in workers after another one failed, or after Ctrl-C."""


class Worker(Protocol):
    """Runs steps. Crew is the implementation with threads of this process."""

    def each(self, function: Callable[[T], None], items: Iterable[T], tick: Callable[[], None], alone: int = 0) -> None:
        """Calls function(item) for all items, the first `alone` of them one after another."""

    def fold(self, start: Callable[[], S], update: Callable[[S, T], None], items: Iterable[T]) -> list[S]:
        """Calls update(state, item) for all items of a loop within a step; returns one state for each participant."""


class Crew:
    """`each` runs a function over items on `n_threads` threads; `fold` shares one item's loop with idle threads."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._stop = threading.Event()
        self._change = threading.Condition()
        self._open: list[_Shared[Any, Any]] = []  # loops that idle threads may join
        self._busy = 0  # threads that still take items

    def each(self, function: Callable[[T], None], items: Iterable[T], tick: Callable[[], None], alone: int = 0) -> None:
        """Runs function(item) for all items; calls `tick` about ten times a second on the calling thread.

        Args:
            alone: number of items at the beginning that one thread does before the others start. Kernels are compiled
                on their first call, under a lock that all threads share.

        Raises:
            The first exception of any worker, after all workers have stopped, or PATIENCE seconds later.
        """
        remaining = iter(items)
        if alone and self.n_threads > 1:
            self._each(function, list(itertools.islice(remaining, alone)), tick, 1)
        self._each(function, remaining, tick, self.n_threads)

    def _each(
        self, function: Callable[[T], None], items: Iterable[T], tick: Callable[[], None], n_threads: int
    ) -> None:
        errors: list[BaseException] = []
        ended: list[None] = []  # one entry for each thread that ended normally
        todo = _Locked(items)
        threads = [
            threading.Thread(target=self._work, args=(function, todo, errors, ended), daemon=True)
            for _ in range(n_threads)
        ]
        self._stop.clear()
        self._busy = len(threads)
        try:
            for thread in threads:
                _start(thread)
            self._wait(threads, tick)
        except BaseException:
            self._stop.set()
            self._wait(threads, lambda: None)
            raise
        if errors:
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
        if len(ended) < len(threads):
            raise MemoryError  # nothing else ends a thread without an exception

    def _wait(self, threads: list[threading.Thread], tick: Callable[[], None]) -> None:
        """Waits until all threads have ended, or for PATIENCE seconds after they were told to stop."""
        last = float("inf")
        for thread in threads:
            while thread.is_alive() and time.monotonic() < last:
                thread.join(0.1)
                tick()
                if self._stop.is_set():
                    last = min(last, time.monotonic() + PATIENCE)

    def _work(
        self, function: Callable[[T], None], todo: _Locked[T], errors: list[BaseException], ended: list[None]
    ) -> None:
        try:
            for item in todo:
                if self._stop.is_set():
                    break
                function(item)
            with self._change:
                self._busy -= 1
                self._change.notify_all()
            self._help()
            ended.append(None)
        except BaseException as error:
            self._stop.set()
            errors.append(error)

    def _help(self) -> None:
        """Joins other threads' loops until no thread has items left."""
        while True:
            with self._change:
                while not self._open and self._busy and not self._stop.is_set():
                    self._change.wait(0.1)  # a thread that dies notifies no one
                if not self._open:
                    return
                shared = self._open[0]
            shared.take_part()
            self._close(shared)  # it has no items left

    def fold(self, start: Callable[[], S], update: Callable[[S, T], None], items: Iterable[T]) -> list[S]:
        """Calls update(state, item) for all items; returns one state for each thread that took part."""
        shared = _Shared(start, update, _Locked(items), self._stop)
        with self._change:
            self._open.append(shared)
            self._change.notify()
        shared.take_part()
        self._close(shared)
        return shared.finish()

    def _close(self, shared: _Shared[Any, Any]) -> None:
        with self._change:
            if shared in self._open:
                self._open.remove(shared)


class _Locked(Generic[T]):
    """An iterator that threads share."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)


class _Shared(Generic[S, T]):
    """One loop that several threads may run at once."""

    def __init__(
        self, start: Callable[[], S], update: Callable[[S, T], None], items: _Locked[T], stop: threading.Event
    ) -> None:
        self._start, self._update, self._items, self._stop = start, update, items, stop
        self._states: list[S] = []
        self._errors: list[BaseException] = []
        self._active = 0
        self._closed = False
        self._change = threading.Condition()

    def take_part(self) -> None:
        with self._change:
            if self._closed:
                return
            self._active += 1
        try:
            state = self._start()
            for item in self._items:
                if self._stop.is_set():
                    raise Stopped
                self._update(state, item)
            with self._change:
                self._states.append(state)
        except BaseException as error:
            self._errors.append(error)
        finally:
            with self._change:
                self._active -= 1
                self._change.notify_all()

    def finish(self) -> list[S]:
        """Waits for the helpers that are still working. The owner calls it after its own part."""
        with self._change:
            self._closed = True
            while self._active:
                self._change.wait()
        if self._errors:
            raise self._errors[0]
        return self._states


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        raise MergeError(
            f"no more threads can be started ({error}). Use fewer --threads, or raise the limit on memory (ulimit -v) "
            "or processes (ulimit -u)."
        ) from error
