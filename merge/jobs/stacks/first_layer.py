"""First layers that differ from all others by architecture: T5's has a position bias, ModernBERT's lacks a norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.architecture import Stack
from merge.errors import Problem
from merge.planning.inputs import Input
from merge.quoting import some


class FirstLayer:
    """Tensors that only the first layer of a stack has (`more`) or lacks (`less`), by the end of their names."""

    def __init__(self, model: Input, stack: Stack) -> None:
        architecture = model.architecture
        special = {entry[1:]: entry[0] for entry in architecture.first_layer}
        self.more: dict[str, None] = {}
        self.less: dict[str, None] = {}
        if not special:
            return
        for name in model.tensors:
            at = stack.layer(name)
            own = architecture.parameter(stack.name(0, at[1]), special) if at is not None and at[0] < 2 else None
            if at is not None and own is not None:
                (self.more if special[own] == "+" else self.less)[at[1]] = None

    def problems(self, out_layer: int, numbers: Sequence[int], where: str | None) -> Iterator[Problem]:
        """A layer that cannot stand where it is to stand."""
        if self.less and any((number == 0) != (out_layer == 0) for number in numbers):
            number = next(number for number in numbers if (number == 0) != (out_layer == 0))
            yield Problem(
                f"layer {number} cannot become layer {out_layer}: in this architecture the first layer, and no other, "
                f"has no {some(list(self.less))}.",
                where,
                "Let the first slice begin at layer 0, and no other slice.",
            )

    def taken_from(self, suffix: str, out_layer: int, number: int) -> int | None:
        """The layer that provides an output layer's tensor; None if the output layer does not have it."""
        if suffix not in self.more:
            return number
        return 0 if out_layer == 0 else None
