"""Layer stacks, found in tensor names and confirmed by the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
@dataclass(frozen=True, slots=True)
class Stack:
    """Layers named `prefix` + number + "." + suffix."""

    prefix: str
    n_layers: int

    def layer(self, name: str) -> tuple[int, str] | None:
        """(number, suffix) of a tensor of this stack; None for any other."""
        if not name.startswith(self.prefix):
            return None
        number, _, suffix = name[len(self.prefix) :].partition(".")
        return (int(number), suffix) if _is_number(number) and suffix else None

    def name(self, layer: int, suffix: str) -> str:
        return f"{self.prefix}{layer}.{suffix}"


def find_stacks(names: Iterable[str], config: Mapping[str, Any]) -> tuple[Stack, ...]:
    """The stacks whose length the config confirms, the longest first; without such a config, the longest run."""
    numbers: dict[str, dict[int, None]] = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts[:-1]) if _is_number(part)), None)
        if place is not None:
            numbers.setdefault("".join(part + "." for part in parts[:place]), {})[int(parts[place])] = None
    runs = [Stack(prefix, len(found)) for prefix, found in numbers.items() if max(found) + 1 == len(found)]
    runs.sort(key=lambda stack: -stack.n_layers)
    counts = dict(_layer_counts(config)).values()
    return tuple(stack for stack in runs if stack.n_layers in counts) or tuple(runs[:1])


def main_stack(stacks: tuple[Stack, ...], config: Mapping[str, Any]) -> Stack | None:
    """The stack that `layer_range` counts: the language model's, of the length the (text) config gives."""
    text = config.get("text_config") or config.get("llm_config") or config
    wanted = [text[key] for key in LAYER_COUNT_KEYS if key in text]
    confirmed = [stack for stack in stacks if stack.n_layers in wanted]
    plain = [stack for stack in confirmed or stacks if "vision" not in stack.prefix and "visual" not in stack.prefix]
    chosen = plain or confirmed or list(stacks)
    return chosen[0] if chosen else None


def _layer_counts(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value, f"{path}{key}.")
        elif key in LAYER_COUNT_KEYS and isinstance(value, int):
            yield path + key, value


def _is_number(part: str) -> bool:
    """Whether a part of a name counts layers: written as a number is, so that it can be written again."""
    return part.isdecimal() and part.isascii() and len(part) < 10 and (part == "0" or part[0] != "0")
