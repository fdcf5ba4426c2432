"""Which tensors a GGUF file has, and of which of the model's tensors each is made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge.errors import UsageError
from merge.gguf_layouts import Config, Family, head_dim
from merge.plan import TensorRef
from merge.quoting import some

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.*)$")
_LEFT_OUT = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")  # computed by llama.cpp itself


@dataclass(frozen=True)
class GgufTensor:
    """
    Attributes:
        shape: as in torch; an expert's number comes first.
        parts: tensors of the model, one after another: the experts of a layer, or a single one.
        values: of a tensor that is not read.
        head: rows of one head, whose halves are interleaved; 0: rows stay where they are.
        add: to every entry.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...] = ()
    values: tuple[float, ...] = ()
    head: int = 0
    add: float = 0.0

    def interleaved(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """rows (heads * head, length): a half of a head, then the other -> by turns"""
        if not self.head:
            return rows
        return rows.reshape(-1, 2, self.head // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(family: Family, config: Config, tensors: Mapping[str, TensorRef], path: str) -> list[GgufTensor]:
    """In the order of the model's tensors.

    Raises:
        UsageError: names that llama.cpp's architecture does not have.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == family.arch)
    names = get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    found: list[GgufTensor] = [
        GgufTensor(name, (len(values),), values=tuple(values)) for name, values in family.extra(config).items()
    ]
    unknown = []
    for name, parts in _stacked(tensors):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            unknown.append(name)
            continue
        shape = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
        head = head_dim(config) if family.rotates(name) else 0
        found.append(GgufTensor(mapped, shape, parts, head=head, add=family.added(name)))
    if unknown:
        raise UsageError(f"{path}: llama.cpp's {family.arch} has no tensors for {some(unknown)}.")
    return found


def _stacked(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, tuple[TensorRef, ...]]]:
    """Experts of a layer under one name: of `x.experts.3.up_proj.weight`, `x.experts.up_proj.weight`."""
    experts: dict[str, dict[int, TensorRef]] = {}
    for name in tensors:
        if match := _EXPERT.match(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensors[name]
    seen = set()
    for name, ref in tensors.items():
        if _LEFT_OUT.search(name):
            continue
        match = _EXPERT.match(name)
        stacked = f"{match[1]}.{match[3]}" if match else name
        if stacked not in seen:
            seen.add(stacked)
            of = experts.get(stacked)
            yield stacked, (ref,) if of is None else tuple(of[number] for number in sorted(of))
