"""The Recipe: frozen dataclasses of the user's request. mergekit's YAML schema, plus name, seed and allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Conditional:
    """`{filter: mlp, value: ...}`: the value for tensors whose name contains the filter; None or "*": for all."""

    filter: str | None
    value: Setting

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


# A scalar; a gradient over the layers of a slice; or conditions, where the first match wins.
Setting = Scalar | tuple[Scalar, ...] | tuple[Conditional, ...]
Settings = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as the recipe names it: a local directory or a hub id, and an adapter to fold, if any.

    `text` is what the recipe wrote; `path` is absolute for a local directory, else the hub id. Two references are equal
    when they mean the same model, however they are written. `override_architecture` is read and has no effect.

    In a parsed recipe `path` is as written, and `written` tells how to read it: a "reference", which may have
    an adapter and a revision in it, or the "path" of one model. What is resolved has "".
    """

    text: str = field(compare=False)
    path: str
    revision: str | None = None
    adapter: ModelRef | None = None
    override_architecture: str | None = field(default=None, compare=False)
    written: Literal["", "reference", "path"] = field(default="", compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Source:
    model: ModelRef
    layer_range: tuple[int, int] | None = None  # half-open
    parameters: Settings = field(default_factory=dict)
    line: int = 0
    statistics: str | None = None  # absolute path of a file that `merge statistics` made of this model


@dataclass(frozen=True, slots=True)
class Slice:
    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    parameters: Settings = field(default_factory=dict)
    line: int = 0
    merge_method: str | None = None  # None: the module's or the recipe's


@dataclass(frozen=True, slots=True)
class Module:
    """One tower of a model that has several. Either slices or models is not empty."""

    slices: tuple[Slice, ...] = ()
    models: tuple[Source, ...] = ()
    parameters: Settings = field(default_factory=dict)
    merge_method: str | None = None  # None: the recipe's


@dataclass(frozen=True, slots=True)
class Upscale:
    """Depth up-scaling of the only model: exactly one of overlap, layers and insert_every is given."""

    overlap: int | None = None
    layers: int | None = None
    insert_every: int | None = None
    zero_init: bool = True  # inserted layers add nothing to the residual stream at first


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Where a token's row comes from, for models that lack the token; with `force` for all.

    `kind`: "model" (the same token of `model`), "model_token" (its `token` or `token_id`), "zero"; None: as usual.
    """

    kind: str | None = None
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """`tokenizer:` without its source."""

    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """How one expert's MLP is made from its model's, and which tokens the router should send to it.

    Attributes:
        positive, negative: prompts whose hidden states make the router's row, the second kind subtracted.
        noise_scale: standard deviation of normal noise that is added to its weights.
        residual_scale: factor of what it adds to the residual stream, multiplied into its last matrix.
    """

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Mixture:
    """`experts` and `shared` belong to Recipe.models in this order; `reinit`: share of neurons to draw again."""

    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gate_mode: str = "hidden"
    experts_per_token: int = 2
    architecture: str | None = None
    reinit: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge. Exactly one of models, slices and modules is not empty."""

    merge_method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    base_model: ModelRef | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None  # safetensors name
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = None
    seed: int = 0
    allow: tuple[str, ...] = ()
    align: str | None = None  # "permutation"
    upscale: Upscale | None = None
    config_donor: ModelRef | None = None  # whose config.json the result gets; None: the base's, else the first model's
    tokenizer_donor: ModelRef | None = None
    compat: str | None = None  # a tool whose ignored keys are ignored here too: "mergekit"
    notes: tuple[str, ...] = ()
    mixture: Mixture | None = None  # of experts; `models` are then these, see merge/recipe/mixture.py
    text: str = ""
    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)  # "parameters.t" -> line, for messages of later stages

    def where(self, key: str) -> str | None:
        """`file.yaml:7`, the place to name in a message about `key`."""
        line = self.lines.get(key)
        return self.file if line is None or self.file is None else f"{self.file}:{line}"


# Ways to align models before they are merged.
ALIGN = ("permutation",)

# Tools whose recipes may have keys without effect.
COMPAT = ("mergekit",)

# Leniencies by name, and what each one permits.
ALLOW = {
    "missing_tensors": "merge a tensor from the inputs that have it",
    "shape_mismatch": "copy a tensor whose shapes differ from the base (else the first model)",
    "nonfinite": "let NaN and infinity through",
    "overflow": "let values that are too large for the output dtype become infinite",
    "unrelated_base": "merge task vectors that are as long as the base itself",
    "zero_task_vector": "merge a model that equals the base",
    "integer_mismatch": "copy an integer tensor that differs between inputs from the base (else the first model)",
    "different_bases": "combine adapters that were trained on different bases",
}
