"""Selects the tensors that an adapter changes by factors, keeps whole, or leaves out.

All names are those in memory, as PEFT has them, where transformers knows the model; else those on the disk.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.architecture import is_embedding, is_head, is_input_side
from merge.architecture.loaded import CONV1D, EMBEDDING, LINEAR, Loaded, Piece, how_loaded, whole_piece
from merge.dtypes import DTYPES
from merge.errors import CheckpointError, UsageError
from merge.plan import TensorRef
from merge.planning.inputs import Input, Inputs
from merge.quoting import some
from merge.sources.joined import joined
from merge.sources.part import part

# Models of transformers whose linear layers are stored (in, out), and the names of those layers.
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
_HEAD = "lm_head.weight"
_FLOATS = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
# Layers that PEFT does not wrap, because these models' kernels use their weights directly.
_NOT_WRAPPED = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}, ("out_proj", "conv1d")
# In models with experts, PEFT takes layers of these names for experts if target_modules names them.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Pair:
    """One tensor in both models, of one shape.

    `module` is the name without its last part; `turned`: matrices lie on the disk transposed.
    """

    name: str
    base: TensorRef
    tuned: TensorRef
    turned: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def expert(self, place: int) -> Pair:
        """One of the matrices that a tensor stacks."""
        shape = self.base.shape[1:]
        base, tuned = (part(ref, place * math.prod(shape), shape) for ref in (self.base, self.tuned))
        return Pair(f"{self.name}[{place}]", base, tuned)


@dataclass(frozen=True)
class ExtractedMatrix:
    """A matrix, or a stack of them, whose difference becomes A and B.

    Attributes:
        parameter: it is not its module's weight to PEFT (target_parameters).
        transposed: stored (in, out), as embeddings and Conv1D are.
        rank: at most; None: as many as the energy asks for.
    """

    pair: Pair
    embedding: bool
    transposed: bool
    rank: int | None
    parameter: bool = False

    @property
    def name(self) -> str:
        """As the rank patterns of PEFT's config have it."""
        return self.pair.name if self.parameter else self.pair.module


@dataclass(frozen=True)
class Selection:
    """`groups`: the targets, those of one module together; `modules`: all modules that PEFT could name."""

    groups: tuple[tuple[ExtractedMatrix, ...], ...]
    others: tuple[Pair, ...]
    fan_in_fan_out: bool
    notes: tuple[str, ...]
    modules: tuple[str, ...]
    ties: Mapping[str, str]

    @property
    def targets(self) -> tuple[ExtractedMatrix, ...]:
        return tuple(target for group in self.groups for target in group)


@dataclass(frozen=True)
class Choice:
    """The user's choices; patterns are shell patterns of module names."""

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
    loaded = how_loaded(base.config, {pair.name: pair.base for pair in pairs})
    modules = [pair.module for pair in pairs]
    ties: Mapping[str, str] = {}
    if loaded is not None:
        pairs, more = _in_memory(pairs, loaded)
        notes, modules, ties = (*notes, *more), list(loaded.own), loaded.ties
    elif base.tied:
        ties = dict.fromkeys([_HEAD], next((name for name in base.tensors if is_embedding(name)), ""))
    ties = {name: source for name, source in ties.items() if all(pair.name != name for pair in pairs)}
    judge = _ModuleJudge(base, loaded, choice)
    groups: dict[str, list[ExtractedMatrix]] = {}
    others: list[Pair] = []
    for pair in pairs:
        target = judge.target(pair)
        if target is None:
            others.append(pair)
        else:
            groups.setdefault(pair.module, []).append(target)
    for module, group in groups.items():  # as the module's class has its parameters
        order = [] if loaded is None else [f"{module}.{name}" for name in loaded.own[module]]
        group.sort(key=lambda target: order.index(target.pair.name) if order else 0)
    if not groups:
        raise UsageError(
            f"no matrix is left for an adapter: {some([pair.module for pair in others])} are not linear layers "
            "or not asked for. Check --include and --exclude."
        )
    turned = any(each.transposed and not each.embedding and not each.parameter for g in groups.values() for each in g)
    return Selection(tuple(map(tuple, groups.values())), tuple(others), turned, notes, tuple(modules), ties)


class _ModuleJudge:
    """Decides whether a tensor becomes factors."""

    def __init__(self, base: Input, loaded: Loaded | None, choice: Choice) -> None:
        self.base, self.loaded, self.choice = base, loaded, choice
        self._kind = str(base.config.get("model_type"))
        self._taken = _TAKEN_FOR_EXPERTS if loaded is not None and any(map(_is_expert, loaded.own)) else ()

    def target(self, pair: Pair) -> ExtractedMatrix | None:
        """The target; None for tensors that are kept whole or left out."""
        module, leaf = pair.module, pair.module.rpartition(".")[2]
        if not self.choice.takes(module) or 0 in pair.base.shape:
            return None
        if self._is_parameter(pair):
            inputs_first = self.loaded is not None and module in self.loaded.transposed
            return ExtractedMatrix(pair, False, inputs_first != pair.turned, self.choice.rank_of(pair.name), True)
        if not pair.name.endswith(".weight") or len(pair.base.shape) != 2 or pair.turned:
            return None
        if self._kind in _NOT_WRAPPED[0] and leaf in _NOT_WRAPPED[1]:
            return None
        embedding, is_inner, conv1d = self._module(pair)
        if not is_inner and not (self.choice.embeddings and (embedding or self._is_head(pair))):
            return None
        is_parameter = leaf in self._taken and not embedding
        return ExtractedMatrix(pair, embedding, embedding or conv1d, self.choice.rank_of(module), is_parameter)

    def _module(self, pair: Pair) -> tuple[bool, bool, bool]:
        """(it is the embedding of tokens, it is a linear layer inside the model, it is stored (in, out))"""
        if self.loaded is None:
            inner = not is_input_side(pair.name) and not is_head(pair.name)
            return is_embedding(pair.name), inner, pair.module.rpartition(".")[2] in _CONV1D.get(self._kind, ())
        kind = self.loaded.kinds.get(pair.module)
        is_inner = kind in (LINEAR, CONV1D) and pair.name != self.loaded.head
        return kind == EMBEDDING and is_embedding(pair.name), is_inner, kind == CONV1D

    def _is_head(self, pair: Pair) -> bool:
        if self.loaded is None:
            return is_head(pair.name) and not self.base.tied
        return pair.name == self.loaded.head

    def _is_parameter(self, pair: Pair) -> bool:
        """Stacked experts, and routers whose class is not a linear layer."""
        if self.loaded is None or self.loaded.kinds.get(pair.module) is not None or "bias" in pair.name:
            return False
        leaf = pair.module.rpartition(".")[2]
        n_axes = len(pair.base.shape)
        return (n_axes == 3 and _is_expert(pair.module)) or (n_axes == 2 and leaf in ("gate", "router"))


def _in_memory(pairs: Sequence[Pair], loaded: Loaded) -> tuple[list[Pair], list[str]]:
    """The pairs under their names in memory, joined or split as transformers does; and notes."""
    stored = {pair.name: pair for pair in pairs}
    found: dict[str, list[Pair]] = {}  # by the first stored tensor that each has a part of, for the checkpoint's order
    used: dict[str, None] = {}
    for name, pieces in loaded.pieces.items():
        if all(piece.tensor in stored for piece in pieces):
            base, tuned = (_assembled(name, loaded.shapes[name], pieces, stored, side) for side in (False, True))
            found.setdefault(pieces[0].tensor, []).append(Pair(name, base, tuned, pieces[0].turned))
            used.update(dict.fromkeys(piece.tensor for piece in pieces))
    rest = [name for name in stored if name not in used]
    said = "transformers has no such tensor in memory, or makes it of others in a way that is not known here"
    notes = [f"{some(rest)}: {said}"] if rest else []
    return [each for pair in pairs for each in found.get(pair.name, [] if pair.name in used else [pair])], notes


def _assembled(
    name: str, shape: tuple[int, ...], pieces: Sequence[Piece], stored: Mapping[str, Pair], is_tuned: bool
) -> TensorRef:
    """A parameter as in memory (except for `turned`), made of its pieces."""
    tensors = {each.tensor: stored[each.tensor].tuned if is_tuned else stored[each.tensor].base for each in pieces}
    first = tensors[pieces[0].tensor]
    if pieces == (whole_piece(first.name, first.shape),) or pieces[0].turned:
        return tensors[pieces[0].tensor]
    has_experts = any(piece.stacked or piece.expert is not None for piece in pieces)
    blocks = []
    for expert in range(shape[0]) if has_experts else (0,):
        for piece in sorted(pieces, key=lambda each: each.row):
            if piece.expert in (None, expert):
                ref = tensors[piece.tensor]
                inner = ref.shape[2:] if piece.stacked else ref.shape[1:]
                row = piece.start + (expert * ref.shape[1] if piece.stacked else 0)
                blocks.append(part(ref, row * math.prod(inner), (piece.rows, *inner)))
    return joined(name, blocks, shape)


def _is_expert(module: str) -> bool:
    return module.rpartition(".")[2] == "experts"


def _pairs(inputs: Inputs, base: Input, tuned: Input) -> tuple[list[Pair], tuple[str, ...]]:
    lone: list[str] = []
    reshaped: list[str] = []
    whole: list[str] = []
    pairs: list[Pair] = []
    for name in inputs.names:
        first, second = base.tensors.get(name), tuned.tensors.get(name)
        if first is None or second is None:
            lone.append(f"{name} (only in {(tuned if first is None else base).ref.text})")
        elif first.shape != second.shape:
            reshaped.append(f"{name} ({list(first.shape)} in the base, {list(second.shape)} in the fine-tune)")
        elif not (DTYPES[first.dtype].is_float and DTYPES[second.dtype].is_float):
            whole.append(name)
        elif first.dtype not in _FLOATS or second.dtype not in _FLOATS:
            raise CheckpointError(
                f"{name}: is float64, and adapters are extracted in float32. Convert the model first."
            )
        else:
            pairs.append(Pair(name, first, second))
    if lone or reshaped:
        raise CheckpointError(
            f"an adapter cannot add, remove or reshape tensors, and {tuned.ref.text} differs from {base.ref.text} in "
            f"{some(lone + reshaped)}. Name its real base; cut a resized vocabulary to the base's first."
        )
    return pairs, tuple([f"{some(whole)}: not floating point, and not compared"] if whole else [])


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
