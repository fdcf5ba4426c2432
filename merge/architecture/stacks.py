"""Layer stacks, found in tensor names and confirmed by the config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Keys of configs that say how many layers a stack has, in any nesting (text_config, vision_config ...).
LAYER_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)

# A name up to its first number: written as numbers are, so that it can be written again.
_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(0|[1-9][0-9]{0,8})\.")


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers named `prefix` + number + "." + suffix, from 0 to n_layers - 1."""

    prefix: str
    n_layers: int

    def layer(self, name: str) -> tuple[int, str] | None:
        """(number, suffix) of a tensor of this stack; None for any other."""
        found = self._numbered(name)
        return found if found is not None and found[0] < self.n_layers else None

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor is of a layer that the config does not count: multi-token prediction, as in DeepSeek-V3."""
        found = self._numbered(name)
        return found is not None and found[0] >= self.n_layers

    def _numbered(self, name: str) -> tuple[int, str] | None:
        if not name.startswith(self.prefix):
            return None
        number, _, suffix = name[len(self.prefix) :].partition(".")
        return (int(number), suffix) if _is_number(number) and suffix else None

    def name(self, layer: int, suffix: str) -> str:
        return f"{self.prefix}{layer}.{suffix}"


def find_stacks(names: Iterable[str], config: Mapping[str, object]) -> tuple[Stack, ...]:
    """The stacks whose length the config confirms, the longest first; without such a config, the longest run.

    A run may go on behind what the config counts, with layers that have more in them than the last one counted.
    """
    names = list(names)
    numbers: dict[str, set[str]] = {}
    for name in names:
        if (found := _NUMBERED.match(name)) is not None:
            numbers.setdefault(found[1], set()).add(found[2])
    runs = [Stack(prefix, len(found)) for prefix, found in numbers.items() if max(map(int, found)) + 1 == len(found)]
    counts = layer_counts(config)
    stacks = [stack for stack in runs if stack.n_layers in counts]
    stacks += [Stack(run.prefix, n) for run in runs if (n := _counted(run, names, counts)) is not None]
    return tuple(sorted(stacks, key=_longest)) or tuple(sorted(runs, key=_longest)[:1])


def _longest(stack: Stack) -> int:
    return -stack.n_layers


def _counted(run: Stack, names: Iterable[str], counts: Sequence[int]) -> int | None:
    """How many layers of a run the config counts, if others follow that have all of the last one's parts and more."""
    shorter = [n for n in counts if 0 < n < run.n_layers]
    if not shorter or run.n_layers in counts:
        return None
    found: dict[int, set[str]] = {number: set() for number in range(run.n_layers)}
    for name in names:
        if (place := run.layer(name)) is not None:
            found[place[0]].add(place[1])
    lengths = [n for n in shorter if all(found[i] > found[n - 1] for i in range(n, run.n_layers))]
    return max(lengths, default=None)


def main_stack(stacks: tuple[Stack, ...], config: Mapping[str, Any]) -> Stack | None:
    """The stack that `layer_range` counts: the language model's, of the length the (text) config gives."""
    text = config.get("text_config") or config.get("llm_config") or config
    wanted = [text[key] for key in LAYER_COUNT_KEYS if key in text]
    confirmed = [stack for stack in stacks if stack.n_layers in wanted]
    plain = [stack for stack in confirmed or stacks if "vision" not in stack.prefix and "visual" not in stack.prefix]
    chosen = plain or confirmed or list(stacks)
    return chosen[0] if chosen else None


def layer_counts(config: Mapping[str, object]) -> list[int]:
    """Every number of layers that a config gives, of all its sections."""
    return [count for _, count in _layer_counts(config)]


def _layer_counts(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value, f"{path}{key}.")
        elif key in LAYER_COUNT_KEYS and isinstance(value, int):
            yield path + key, value


def _is_number(part: str) -> bool:
    """Whether a part of a name counts layers: written as a number is, so that it can be written again."""
    return part.isdecimal() and part.isascii() and len(part) < 10 and (part == "0" or part[0] != "0")
