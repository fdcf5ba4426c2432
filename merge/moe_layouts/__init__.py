"""Layouts of mixtures of experts on disk, one file each. Adding a file adds a layout.

A layout is the architecture of a dense family with several copies of its MLP, so only these families fit. Its file has
the layout's name and holds LAYOUT: its names in recipes, the names of its tensors, and its config, as transformers and
vLLM read them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")


@dataclass(frozen=True)
class Counts:
    """Sizes of a mixture: experts, shared ones, experts for each token, neurons of each and of the shared one."""

    n_experts: int
    n_shared: int
    per_token: int
    neurons: int
    shared_neurons: int


@dataclass(frozen=True)
class Window:
    """The layers that see only the last `size` tokens."""

    size: int | None
    layers: tuple[bool, ...]

    @property
    def everywhere(self) -> int | None:
        """The size if all layers have it."""
        return self.size if self.layers and all(self.layers) else None

    @property
    def is_mixed(self) -> bool:
        return any(self.layers) and not all(self.layers)


@dataclass(frozen=True)
class MoeLayout:
    """One layout.

    Attributes:
        words: what a recipe may write after `architecture:`.
        title: its name in messages and documents.
        families: model types of dense models that fit.
        block: module of a layer that holds router and experts.
        names: of an expert's projections, in the order of PROJECTIONS.
        suffixes: of all other tensors of a layer.
        zero_biases: biases of the layout, which are zeros for families other than the first.
        shared: module of the shared expert, below `block`.
        shared_gate: whether the shared expert has its own gate, the sigmoid of one row.
        most_shared: the number of shared experts that it can have; with `needs_shared` it always has one.
        ties: whether its head may be tied to the embedding.
        head_dim: whether heads may have another width than hidden_size / num_attention_heads.
        config: keys of its own.
        defaults: family -> transformers' defaults for keys that a dense model's config.json lacks.
        files: the code files that it needs, in merge/output.
    """

    words: tuple[str, ...]
    title: str
    families: tuple[str, ...]
    block: str
    names: tuple[str, str, str]
    suffixes: tuple[str, ...]
    config: Callable[[Counts, Window], dict[str, Any]]
    zero_biases: tuple[str, ...] = ()
    shared: str | None = None
    shared_gate: bool = False
    needs_shared: bool = False
    ties: bool = True
    head_dim: bool = True
    mixed_window: bool = False
    files: tuple[str, ...] = ()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def most_shared(self) -> int:
        return 0 if self.shared is None else 1

    def expert(self, number: int, projection: str) -> str:
        """Suffix of a projection of a routed expert."""
        return f"{self.block}.experts.{number}.{self.names[PROJECTIONS.index(projection)]}.weight"

    def shared_expert(self, projection: str) -> str:
        return f"{self.block}.{self.shared}.{projection}.weight"


_FIRST = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")  # in messages


@functools.cache
def all_layouts() -> Mapping[str, MoeLayout]:
    """Every layout by its name."""
    others = {module.name for module in pkgutil.iter_modules(__path__)}.difference(_FIRST)
    return {name: importlib.import_module(f"{__name__}.{name}").LAYOUT for name in (*_FIRST, *sorted(others))}
