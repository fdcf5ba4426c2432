"""Which tensors of a model an adapter can change as factors, and what is to become of the others."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.architecture import is_embedding, is_head, is_input_side
from merge.dtypes import DTYPES
from merge.errors import CheckpointError, UsageError
from merge.plan import TensorRef
from merge.planners.inputs import Input, Inputs
from merge.quoting import some

# Models of transformers whose linear layers are stored (in, out), and the names of those layers.
CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
_FLOATS = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Pair:
    """One tensor in both models, of one shape. `module` is the name without its last part."""

    name: str
    base: TensorRef
    tuned: TensorRef

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Target:
    """A matrix whose difference becomes A (rank, in) and B (out, rank).

    `transposed`: stored (in, out), as embeddings and Conv1D are.
    """

    pair: Pair
    embedding: bool
    transposed: bool
    rank: int | None  # None: as many as the energy asks for


@dataclass(frozen=True)
class Selection:
    targets: tuple[Target, ...]
    others: tuple[Pair, ...]
    fan_in_fan_out: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What the user asked for; patterns are shell patterns of module names."""

    rank: int | None = 16
    energy: float | None = None
    rank_pattern: Mapping[str, int] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    embeddings: bool = False

    def takes(self, module: str) -> bool:
        return (not self.include or _matches(module, self.include)) and not _matches(module, self.exclude)

    def rank_of(self, module: str) -> int | None:
        """By PEFT's rule: the first pattern that fits the end of the module's name."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return rank
        return self.rank


def select(inputs: Inputs, base: Input, tuned: Input, choice: Choice) -> Selection:
    """Sorts the tensors of both models.

    Raises:
        CheckpointError: tensors that only one of them has or that differ in shape, and models in float64.
        UsageError: the patterns leave nothing.
    """
    pairs, notes = _pairs(inputs, base, tuned)
    kind = str(base.config.get("model_type"))
    targets: list[Target] = []
    others: list[Pair] = []
    for pair in pairs:
        embedding = is_embedding(pair.name)
        on_ends = embedding or (is_head(pair.name) and not base.tied)
        fits = pair.name.endswith(".weight") and len(pair.base.shape) == 2 and 0 not in pair.base.shape
        inner = not is_input_side(pair.name) and not is_head(pair.name)
        if fits and choice.takes(pair.module) and (inner or (on_ends and choice.embeddings)):
            conv1d = pair.module.rpartition(".")[2] in CONV1D.get(kind, ())
            targets.append(Target(pair, embedding, embedding or conv1d, choice.rank_of(pair.module)))
        else:
            others.append(pair)
    if not targets:
        raise UsageError(
            f"no matrix is left to make an adapter of: {some([pair.module for pair in others])} are not linear layers "
            "or not asked for. Check --include and --exclude."
        )
    return Selection(tuple(targets), tuple(others), any(t.transposed and not t.embedding for t in targets), notes)


def _pairs(inputs: Inputs, base: Input, tuned: Input) -> tuple[list[Pair], tuple[str, ...]]:
    lone: list[str] = []
    reshaped: list[str] = []
    whole: list[str] = []
    pairs: list[Pair] = []
    for name in inputs.names():
        first, second = base.tensors.get(name), tuned.tensors.get(name)
        if first is None or second is None:
            lone.append(f"{name} (only in {(tuned if first is None else base).ref.text})")
        elif first.shape != second.shape:
            reshaped.append(f"{name} ({list(first.shape)} in the base, {list(second.shape)} in the fine-tune)")
        elif not (DTYPES[first.dtype].is_float and DTYPES[second.dtype].is_float):
            whole.append(name)
        elif first.dtype not in _FLOATS or second.dtype not in _FLOATS:
            raise CheckpointError(f"{name}: is float64, and adapters are made in float32. Convert the model first.")
        else:
            pairs.append(Pair(name, first, second))
    if lone or reshaped:
        raise CheckpointError(
            f"an adapter cannot add, remove or reshape tensors, and {tuned.ref.text} differs from {base.ref.text} in "
            f"{some(lone + reshaped)}. Name its real base; a resized vocabulary has to be cut to the base's first."
        )
    return pairs, tuple([f"{some(whole)}: not floating point, and not compared"] if whole else [])


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
