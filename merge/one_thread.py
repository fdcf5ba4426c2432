"""ONE_THREAD: holds torch to one thread in each worker."""

from __future__ import annotations

import threading


class _OneThread:
    """Holds torch to the thread of each worker inside, as a context; the last one out puts back what was set.

    Workers run steps side by side, so torch's own threads on top oversubscribe the machine. Decompositions bear it
    worst, as their threads wait for each other thousands of times. Measured on two cores, eigh of two matrices of
    2048 x 2048 in float64: two workers with one thread each 1.6 s, one worker with two threads 1.4 s, but 13 s for a
    single matrix once something else keeps the cores busy. It also makes the order of sums, and so the bytes, the
    same whatever the number of cores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._usual = 0, 1

    def __enter__(self) -> None:
        import torch

        with self._lock:
            if self._inside == 0:
                self._usual = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        import torch

        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.set_num_threads(self._usual)


ONE_THREAD = _OneThread()
