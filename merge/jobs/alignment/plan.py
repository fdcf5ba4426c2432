"""align: permutation, planned: finds the units that can be permuted, and the tensors that hold them.

A unit is what can be renumbered without changing what the model computes: a neuron of an MLP (a row of what goes in, a
column of what comes out), a KV group of an attention with its query heads, a query head within its group. The residual
stream keeps its order, so each module is a problem of its own. What is not known to be symmetric stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge.dtypes import DTYPES
from merge.errors import Problem
from merge.findings.alignment import Member, PermutableModule
from merge.plan import TensorRef
from merge.planned import Planned
from merge.planning.inputs import Inputs
from merge.planning.targets import Layout, Slot, Target
from merge.quoting import counted
from merge.recipe.model import Recipe
from merge.sources import found
from merge.sources.ordered import ordered

# (input projections, output projection) by their names; nothing between them mixes units.
_MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION_OUT = ("o_proj", "out_proj")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads")
_ALIBI = ("bloom", "mpt", "baichuan")  # a head's position decides how far it looks

Shapes = Mapping[str, tuple[int, ...]]  # of a module's tensors, by the rest of their names


class _NotSymmetric(Exception):
    """Raised with the reason why a module's units cannot be permuted."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """A module's units; members: (suffix, axis, whether it is split by query heads)."""

    kind: str
    n_units: int
    per_unit: int
    members: tuple[tuple[str, int, bool], ...]


def align_targets(
    recipe: Recipe, inputs: Inputs, layout: Layout
) -> Planned[tuple[Layout, tuple[PermutableModule, ...]]]:
    """The layout with its sources read in the reference's order, and the findings for these orders.

    The reference is the base, or else the first model of each tensor's sources.
    """
    if not layout.targets:
        return Planned((layout, ()))
    where = recipe.where("align")
    if any(slot.statistics is not None for target in layout.targets for slot in target.slots):
        message = "statistics are of a model as it is stored; they do not fit a model whose units are permuted"
        return Planned((layout, ()), (Problem(message, where, 'Remove "align".'),))
    aligner = _Aligner(inputs, layout.targets)
    targets = aligner.targets()
    problems = []
    if not aligner.units and not aligner.pairs:
        message = "there is nothing to align: no tensor has two sources"
        problems.append(Problem(message, where, 'Remove "align".'))
    elif not aligner.units:
        reasons = "; ".join(aligner.refused) or "no MLP and no attention has tensor names that are known"
        problems.append(Problem(f"found no layer whose units can be permuted: {reasons}.", where, 'Remove "align".'))
    aligned = dataclasses.replace(layout, targets=targets), tuple(aligner.units)
    return Planned(aligned, tuple(problems), tuple(aligner.notes(targets)))


class _Aligner:
    def __init__(self, inputs: Inputs, targets: Sequence[Target]) -> None:
        self.inputs = inputs
        self.units: list[PermutableModule] = []
        self.refused: Counter[str] = Counter()  # reason -> number of modules
        self.pairs = False  # whether any tensor has a source besides the reference
        self._targets = {target.name: target for target in targets}
        self._modules: dict[str, list[str]] = {}  # module -> the rest of the names of its tensors
        for name in self._targets:
            parts = name.split(".")
            for depth in range(1, len(parts)):
                self._modules.setdefault(".".join(parts[:depth]), []).append(".".join(parts[depth:]))
        # (target, slot) -> the order of its units, and their axis
        self._moved: dict[tuple[str, int], tuple[TensorRef, int]] = {}

    def targets(self) -> tuple[Target, ...]:
        for module, suffixes in self._modules.items():
            direct = {suffix.rpartition(".")[0] for suffix in suffixes if suffix.endswith(".weight")}
            for ins, out in _MLPS:
                if direct.issuperset((*ins, out)):
                    self._module(module, ins, out, is_attention=False)
                    break
            out = next((name for name in _ATTENTION_OUT if name in direct), "")
            if out and direct.issuperset(_QKV):
                self._module(module, _QKV, out, is_attention=True)
        return tuple(self._marked(target) for target in self._targets.values())

    def _marked(self, target: Target) -> Target:
        self.pairs = self.pairs or any(not _is_reference(target, slot) for slot in target.slots)
        slots = tuple(self._in_order(target.name, place, slot) for place, slot in enumerate(target.slots))
        return target._replace(slots=slots)

    def _in_order(self, name: str, place: int, slot: Slot) -> Slot:
        moved, ref = self._moved.get((name, place)), self.inputs.all[slot.model].tensors.get(slot.name)
        return slot if moved is None or ref is None else slot._replace(made=ordered(ref, *moved))

    def _module(self, module: str, ins: tuple[str, ...], out: str, is_attention: bool) -> None:
        first = self._targets[f"{module}.{out}.weight"]
        for place, slot in enumerate(first.slots):
            if _is_reference(first, slot):
                continue
            try:
                form, members = self._form(module, place, ins, out, is_attention)
            except _NotSymmetric as reason:
                self.refused[f"{_pattern(module)}: {reason}"] += 1
                continue
            key = f"align {len(self.units)}"
            units = PermutableModule(key, module, form.kind, slot.model, form.n_units, form.per_unit, members)
            sizes = (units.n_units, units.n_inner)
            orders = [found(key, 0, "I64", (n,)) for key, n in zip(units.order_keys, sizes, strict=True)]
            for suffix, axis, by_head in form.members:
                self._moved[f"{module}.{suffix}", place] = orders[by_head], axis
            self.units.append(units)

    def _form(
        self, module: str, place: int, ins: tuple[str, ...], out: str, is_attention: bool
    ) -> tuple[_Form, tuple[Member, ...]]:
        """Raises _NotSymmetric."""
        sources: dict[str, TensorRef] = {}
        references: dict[str, TensorRef] = {}
        for suffix in self._modules[module]:
            target = self._targets[f"{module}.{suffix}"]
            if place < len(target.slots):
                for known, slot in ((sources, target.slots[place]), (references, target.base or target.slots[0])):
                    ref = self.inputs.all[slot.model].tensors.get(slot.name)
                    if ref is not None:
                        known[suffix] = ref
        needed = [f"{name}.weight" for name in (*ins, out)]
        if not sources.keys() >= set(needed) or not references.keys() >= set(needed):
            raise _NotSymmetric("not in every model")
        shapes = {suffix: ref.shape for suffix, ref in (references | sources).items()}
        if is_attention:
            slot = self._targets[f"{module}.{needed[0]}"].slots[place]
            form = _attention(shapes, out, self.inputs.all[slot.model].config, module)
        else:
            form = _mlp(shapes, ins, out)
        for suffix, _, _ in form.members:
            _check(suffix, sources.get(suffix), references.get(suffix))
        members = tuple(
            Member(sources[suffix], references.get(suffix), axis, by_head)
            for suffix, axis, by_head in form.members
            if suffix in sources
        )
        return form, members

    def notes(self, targets: Sequence[Target]) -> list[str]:
        notes = []
        if self.units:
            counts: dict[str, Counter[str]] = {}
            for units in self.units:
                names = ", ".join(dict.fromkeys(_child(member.source.name) for member in units.members))
                counts.setdefault(f"{units.kind} ({names})", Counter())[self.inputs.all[units.model].ref.text] += 1
            for kind, models in counts.items():
                where = ", ".join(f"{counted(count, 'layer')} of {model}" for model, count in models.items())
                notes.append(f"align: {kind}: units of {where} are read in the reference's order")
        notes += [f"align: {count} x {reason}; left as they are" for reason, count in self.refused.items()]
        moved = {name for name, _ in self._moved}
        kept: Counter[str] = Counter()
        for target in targets:
            shape = self._shape(target)
            if target.layer is not None and len(shape) > 1 and target.name not in moved:
                kept[_pattern(target.name)] += 1
        if kept and self.units:
            listed = ", ".join(f"{name} ({count})" for name, count in kept.items())
            notes.append(f"align: no known symmetry, left as they are: {listed}")
        return notes

    def _shape(self, target: Target) -> tuple[int, ...]:
        for slot in target.slots:
            ref = self.inputs.all[slot.model].tensors.get(slot.name)
            if ref is not None:
                return ref.shape
        return ()


def _is_reference(target: Target, slot: Slot) -> bool:
    reference = target.base or target.slots[0]
    return (slot.model, slot.name) == (reference.model, reference.name)


def _pattern(name: str) -> str:
    """`model.layers.*.mlp`: the name without its numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _child(name: str) -> str:
    return name.rsplit(".", 2)[-2]


def _check(suffix: str, source: TensorRef | None, reference: TensorRef | None) -> None:
    for ref in (source, reference):
        if ref is not None and (not ref.is_exact or not DTYPES[ref.dtype].is_float):
            raise _NotSymmetric(f"{suffix} is quantized or computed")
    if source is not None and reference is not None and source.shape != reference.shape:
        raise _NotSymmetric(f"{suffix} is {list(source.shape)}, in the reference {list(reference.shape)}")


def _mlp(shapes: Shapes, ins: tuple[str, ...], out: str) -> _Form:
    first, last = shapes[f"{ins[0]}.weight"], shapes[f"{out}.weight"]
    if len(first) != 2 or len(last) != 2:
        raise _NotSymmetric("its weights are not matrices")
    axis = _unit_axis(shapes, ins[0])
    n_units = first[axis]
    members = []
    for name in ins:
        if shapes[f"{name}.weight"] != first or shapes.get(f"{name}.bias", (n_units,)) != (n_units,):
            raise _NotSymmetric(f"{name} does not fit {ins[0]}")
        members.append((f"{name}.weight", axis, False))
        if f"{name}.bias" in shapes:
            members.append((f"{name}.bias", 0, False))
    if last[1 - axis] != n_units:
        raise _NotSymmetric(f"{out} {list(last)} does not take the {n_units} units of {ins[0]} {list(first)}")
    members.append((f"{out}.weight", 1 - axis, False))
    known = {suffix for suffix, _, _ in members} | {f"{out}.bias"}
    for suffix, shape in shapes.items():
        if suffix not in known and n_units in shape:
            raise _NotSymmetric(f"{suffix} may belong to its units")
    return _Form("mlp", n_units, 1, tuple(members))


def _unit_axis(shapes: Shapes, name: str) -> int:
    """0: a unit is a row, as torch.nn.Linear stores it; 1: a column (GPT-2's Conv1D; only c_fc goes both ways)."""
    if name != "c_fc":
        return 0
    weight, bias = shapes["c_fc.weight"], shapes.get("c_fc.bias")
    if bias is None or weight[0] == weight[1] or bias[0] not in weight:
        raise _NotSymmetric("c_fc does not say whether its units are rows or columns")
    return weight.index(bias[0])


def _attention(shapes: Shapes, out: str, config: Mapping[str, Any], module: str) -> _Form:
    text = config
    side = "vision_config" if "visi" in module or "visual" in module else "text_config"
    if isinstance(config.get(side), Mapping):
        text = config[side]
    if text.get("alibi") or text.get("position_embedding_type") == "alibi" or text.get("model_type") in _ALIBI:
        raise _NotSymmetric("its heads differ by their place (ALiBi)")
    n_heads = next((text[key] for key in _HEAD_COUNTS if isinstance(text.get(key), int)), 0)
    q, k, v, o = (shapes[f"{name}.weight"] for name in (*_QKV, out))
    if any(len(shape) != 2 for shape in (q, k, v, o)):
        raise _NotSymmetric("its weights are not matrices")
    width = text.get("head_dim") or (q[0] // n_heads if n_heads > 0 else 0)
    n_groups = k[0] // width if isinstance(width, int) and width > 0 else 0
    fits = n_groups > 0 and n_heads % n_groups == 0 and k == v and k[0] == n_groups * width
    if not fits or q[0] != n_heads * width or o[1] != q[0]:
        raise _NotSymmetric(f"{n_heads} heads by its config do not fit q {list(q)}, k {list(k)}, v {list(v)}")
    members = []
    for name, rows in zip(_QKV, (q[0], k[0], k[0]), strict=True):
        members.append((f"{name}.weight", 0, name == "q_proj"))
        if f"{name}.bias" in shapes:
            if shapes[f"{name}.bias"] != (rows,):
                raise _NotSymmetric(f"{name}.bias does not fit its weight")
            members.append((f"{name}.bias", 0, name == "q_proj"))
    members.append((f"{out}.weight", 1, True))
    for name, rows in (("q_norm.weight", q[0]), ("k_norm.weight", k[0])):
        if shapes.get(name) == (rows,) and rows != width:  # over all heads at once; else one for every head
            members.append((name, 0, name == "q_norm.weight"))
    known = {suffix for suffix, _, _ in members} | {f"{out}.bias"}
    for suffix, shape in shapes.items():
        shared = suffix in ("q_norm.weight", "k_norm.weight") and shape == (width,)
        if suffix not in known and not shared and not suffix.startswith("rotary_emb."):
            raise _NotSymmetric(f"{suffix} may belong to its heads")
    return _Form("attention", n_groups, n_heads // n_groups, tuple(members))
