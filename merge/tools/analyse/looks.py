"""What a model's delta looks like: nothing, a LoRA of rank r, embeddings or norms only, a few layers, or full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from merge.architecture.tensor_kinds import ROLES
from merge.quoting import some
from merge.tools.analyse.results import AnalysedTensor, DeltaLook

_SAME_RANK = 2 / 3  # of the matrices looked at must have one rank for a LoRA


def look_of(model: int, tensors: Sequence[AnalysedTensor]) -> DeltaLook:
    """Of the model at this place."""
    changed = [tensor for tensor in tensors if tensor.measures.models[model].norm]
    roles = tuple(role for role in ROLES if any(tensor.role == role for tensor in changed))
    layers = tuple(sorted({tensor.layer for tensor in changed if tensor.layer is not None}))
    n_layers = len({tensor.layer for tensor in tensors if tensor.layer is not None})
    low, rank = _low_rank(model, changed)
    is_lora = rank is not None
    modules = tuple(sorted({_module(tensor) for tensor in low})) if is_lora else ()
    whole = tuple(sorted({_module(tensor) for tensor in changed if tensor not in low})) if is_lora else ()
    if not changed:
        return DeltaLook("none", "nothing changed", None, (), (), n_layers, (), ())
    if is_lora:
        text = f"LoRA of rank {rank} on {some(list(modules), 4)}" + (f", and {some(list(whole), 4)}" if whole else "")
        kind = "lora"
    elif set(roles) <= {"embedding", "head"}:
        kind, text = "embeddings", f"{' and '.join(roles)} only"
    elif set(roles) <= {"norm"}:
        kind, text = "norms", "norms only"
    else:
        kind = "full"
        unchanged = [role for role in ROLES if any(t.role == role for t in tensors) and role not in roles]
        text = "full" + (f", but for {some(unchanged, 4)}" if unchanged else "")
    if 0 < len(layers) < n_layers:
        text += f", in {len(layers)} of {n_layers} layers ({_spans(layers)})"
    return DeltaLook(kind, text, rank, roles, layers, n_layers, modules, whole)  # type: ignore[arg-type]


def _low_rank(model: int, changed: Sequence[AnalysedTensor]) -> tuple[list[AnalysedTensor], int | None]:
    """The matrices that a LoRA changed, and its rank; none if too few of those looked at have the same.

    Matrices of a role of which one was looked at count as that one.
    """
    ranks: dict[str, list[int | None]] = {}
    for tensor in changed:
        if tensor.spectra is not None and (one := tensor.spectra.models[model]) is not None:
            ranks.setdefault(_module(tensor), []).append(one.rank)
    found = Counter(rank for of in ranks.values() for rank in of if rank is not None)
    if not found:
        return [], None
    rank, _ = found.most_common(1)[0]
    same = {module for module, of in ranks.items() if sum(each == rank for each in of) >= _SAME_RANK * len(of)}
    inner = [len(of) for module, of in ranks.items()]
    if sum(len(ranks[module]) for module in same) < _SAME_RANK * sum(inner):
        return [], None
    return [tensor for tensor in changed if len(tensor.shape) == 2 and _module(tensor) in same], rank


def _module(tensor: AnalysedTensor) -> str:
    """`q_proj` of model.layers.3.self_attn.q_proj.weight"""
    parts = tensor.name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def _spans(numbers: Sequence[int]) -> str:
    """`0-3, 7`"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
