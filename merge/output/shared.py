"""The sink of a process that does a part of a run: it writes into the shards that the run made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from merge.output.directory import explained
from merge.output.shard_files import ShardFiles
from merge.output.sink import MemorySink
from merge.output.workspace import RESULT
from merge.plan import Plan, Step

OnDone = Callable[[int, Mapping[str, object]], None]


class SharedShards(MemorySink):
    """A context manager. Keeps nothing: records go to `on_done`, which may be called from any thread."""

    def __init__(self, plan: Plan, partial: Path, on_done: OnDone) -> None:
        super().__init__(plan)
        self._partial, self._on_done = partial, on_done
        self._shards = ShardFiles(partial, partial / RESULT)

    def __enter__(self) -> SharedShards:
        with explained(self._partial):
            for shard in self.plan.shards:
                self._shards.join(shard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shards.close()

    @property
    def name(self) -> str:
        return str(self._partial)

    @property
    def held_bytes(self) -> int:
        return 0

    def write(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        self._shards.write(step, element, data, itemsize)

    def read_into(self, step: Step, element: int, data: memoryview, itemsize: int) -> None:
        self._shards.read_into(step, element, data, itemsize)

    def finish(self, index: int, record: dict[str, object]) -> None:
        super().finish(index, record)
        self._on_done(index, record)

    def sync(self) -> None:
        with explained(self._partial):
            self._shards.sync()
