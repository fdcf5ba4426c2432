"""The crew of threads ends when one of them fails, dies or waits for ever; too little address space is said first."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bad_inputs.room import call

from merge import address_space
from merge.engine import crew
from merge.engine.crew import Crew
from merge.errors import MergeError


def nothing() -> None:
    pass


def test_the_first_items_are_done_alone_and_in_order() -> None:
    names: list[tuple[int, str]] = []
    Crew(3).each(lambda item: names.append((item, threading.current_thread().name)), range(20), nothing, alone=5)
    assert [item for item, _ in names[:5]] == list(range(5))
    assert len({name for _, name in names[:5]}) == 1
    assert sorted(item for item, _ in names) == list(range(20))


def test_a_lock_that_a_failed_thread_holds_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numba's compiler lock, which a thread that runs out of memory may die with."""
    monkeypatch.setattr(crew, "PATIENCE", 0.2)
    lock, waits = threading.Lock(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            lock.acquire()
            waits.wait(20)
            raise MemoryError
        waits.set()
        lock.acquire()  # for ever

    with pytest.raises(MemoryError):
        Crew(2).each(work, [0, 1], nothing)
    lock.release()  # the thread that was left behind ends


def test_a_thread_that_dies_wakes_those_that_wait_for_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, even telling the others fails."""
    idle = threading.Event()

    def work(item: int) -> None:
        if item == 0:
            idle.wait(20)

    class Silent(threading.Condition):
        def notify_all(self) -> None:
            if idle.is_set():
                raise MemoryError
            idle.set()

    few = Crew(2)
    monkeypatch.setattr(few, "_change", Silent())
    with pytest.raises(MemoryError):
        few.each(work, [0, 1], nothing)


def test_threads_that_end_without_a_word_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crew, "_work", lambda self, *_: None)
    with pytest.raises(MemoryError):
        Crew(2).each(lambda item: None, [0, 1], nothing)


def test_threads_that_cannot_start_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def failing(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    def endless() -> Iterator[int]:
        while True:
            yield 0

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(MergeError, match=r"no more threads can be started .*ulimit -v"):
        Crew(2).each(lambda item: None, endless(), nothing)
    assert not started[0].is_alive()


@pytest.mark.parametrize("more", [-(1 << 20), 64 << 20])
def test_too_little_address_space_is_one_message(tmp_path: Path, make_model: Callable[..., Path], more: int) -> None:
    """Before libraries are loaded; above what they take, before the run begins."""
    make_model(tmp_path / "a")
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    limit = address_space.COMPILER + more
    done = subprocess.run(
        [sys.executable, "-m", "merge", "run", "r.yaml", "-o", "out", "--threads", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("merge: this process may address ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


@pytest.mark.parametrize("words", ["can't start new thread", "libx.so: failed to map segment from shared object"])
def test_other_ways_to_say_that_memory_is_out(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def fail() -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("merge.methods.all_methods", fail)
    code, _, err = call(["methods"])
    assert (code, err.partition(". ")[0]) == (1, "merge: out of memory")
