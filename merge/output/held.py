"""What a run of tiny tensors gives, held until it is done: neighbours are then written in one call, not in 64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LARGEST = 1 << 17  # bytes of a write that is held; larger ones gain nothing


class HeldWrites:
    """One thread's own.

    Attributes:
        lines: of the journal, in the order of the steps.
    """

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._writes: list[tuple[str, int, bytes]] = []

    def hold(self, file: str, place: int, data: memoryview) -> None:
        self._writes.append((file, place, data.tobytes()))

    def writes(self) -> Iterator[tuple[str, int, bytes]]:
        """(file, place, bytes) of what was held, with neighbours put together."""
        group: list[bytes] = []
        first, end = ("", 0), ("", 0)
        for file, place, data in sorted(self._writes, key=lambda write: write[:2]):
            if (file, place) != end and group:
                yield *first, b"".join(group)
                group = []
            if not group:
                first = file, place
            group.append(data)
            end = file, place + len(data)
        if group:
            yield *first, b"".join(group)
