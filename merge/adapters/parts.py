"""The parts of an adapter: factors, whole tensors, rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge.plan import TensorRef


@dataclass(frozen=True)
class LoraModule:
    """The change of one matrix: scaling · B·A, with DoRA's magnitude if it has one.

    Attributes:
        name: of the module in the base model, e.g. "model.layers.0.self_attn.q_proj"; its matrix is `name`.weight.
        a: A, (rank, in); for an embedding (rank, vocabulary). Of a convolution (rank, in, ...).
        b: B, (out, rank); for an embedding (width, rank). Of a convolution (out, rank, 1 ...).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude: DoRA's m: (out,), for an embedding (width,).
        embedding: the base's matrix has the vocabulary first: its change is scaling · (B·A)^T.
        fan_in_fan_out: the config says that matrices are stored (in, out), as GPT-2's Conv1D has them; False for
            embeddings.
        bias: what is added to the module's bias, times the scaling: (out,) (lora_bias).
    """

    name: str
    a: TensorRef
    b: TensorRef
    rank: int
    scaling: float
    magnitude: TensorRef | None = None
    embedding: bool = False
    fan_in_fan_out: bool = False
    bias: TensorRef | None = None


@dataclass(frozen=True)
class ParameterFactors:
    """The factors of a parameter that is not a module's weight (target_parameters), such as a layer's experts.

    Attributes:
        module: that the parameter belongs to; which of its parameters it is, the file does not say.
        depth: of several that are adapted, the first in the module's order lies deepest; the last has depth 0.
        a: the A of all experts one below the other, (experts · rank, in).
        b: column k · experts + e is column k of the B of expert e, (out, rank · experts).
    """

    module: str
    depth: int
    a: TensorRef
    b: TensorRef


@dataclass(frozen=True)
class OtherModule:
    """One module's tensors in an adapter of another kind than LoRA, by the rest of their names, and shared ones."""

    name: str
    parts: Mapping[str, TensorRef]


@dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding: rows[i] is the row of token indices[i] (trainable_token_indices)."""

    rows: TensorRef
    indices: tuple[int, ...]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter, each in its place; see Adapter."""

    modules: dict[str, LoraModule] = field(default_factory=dict)
    parameters: dict[str, ParameterFactors] = field(default_factory=dict)
    others: dict[str, OtherModule] = field(default_factory=dict)
    saved: dict[str, TensorRef] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
