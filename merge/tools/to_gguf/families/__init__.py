"""What llama.cpp calls an architecture and its numbers: one file a family. Adding a file adds a family.

Names and meanings of metadata are llama.cpp's (its GGUF specification, the constants of the gguf package).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import CheckpointError, UsageError
from merge.quoting import quoted

if TYPE_CHECKING:
    from gguf import GGUFWriter

Config = Mapping[str, Any]
Describe = Callable[["GGUFWriter", Config], None]


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        arch: its name in llama.cpp.
        classes: of transformers, as config.json names them.
        describe: adds what `described` does not.
        permuted: llama.cpp rotates neighbouring entries of a head where transformers rotates halves, so rows of query
            and key weights change places.
        norm_plus_one: transformers multiplies by 1 + weight, llama.cpp by the weight.
        extra: tensors that are not in the checkpoint but follow from the config: name -> values.
    """

    arch: str
    classes: tuple[str, ...]
    describe: Describe = lambda writer, config: None
    permuted: bool = False
    norm_plus_one: bool = False
    extra: Callable[[Config], Mapping[str, list[float]]] = lambda config: {}


def family_of(config: Config, path: str) -> Family:
    """Raises UsageError for a class that no family has."""
    known = {name: family for family in _families() for name in family.classes}
    found = [name for name in config.get("architectures") or [] if name in known]
    if not found:
        named = ", ".join(quoted(str(name)) for name in config.get("architectures") or []) or "none"
        raise UsageError(
            f"{path}/config.json: architectures: found {named}; GGUF files are written for {', '.join(sorted(known))}."
        )
    return known[found[0]]


def _families() -> list[Family]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [family for name in modules for family in importlib.import_module(f"{__name__}.{name}").FAMILIES]


def number(config: Config, *keys: str, default: Any = None) -> Any:
    """The first of the keys that the config has. Raises CheckpointError where none is there and no default."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    if default is None:
        raise CheckpointError(f"config.json: {keys[0]} is missing; a GGUF file has to say it.")
    return default


def head_dim(config: Config) -> int:
    return int(number(config, "head_dim", default=config["hidden_size"] // config["num_attention_heads"]))


def rope(config: Config, kind: str = "full_attention") -> Config:
    """The rope parameters of one kind of layers, as transformers 5 or 4 writes them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get(kind) or found
    return {"rope_theta": config.get("rope_theta", 10000.0), **{k: v for k, v in found.items() if v is not None}}


def described(writer: GGUFWriter, config: Config) -> None:
    """What every decoder with RMS norms and rotary positions has."""
    writer.add_context_length(int(number(config, "max_position_embeddings")))
    writer.add_embedding_length(int(number(config, "hidden_size")))
    writer.add_block_count(int(number(config, "num_hidden_layers")))
    writer.add_feed_forward_length(int(number(config, "intermediate_size")))
    heads = int(number(config, "num_attention_heads"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(number(config, "num_key_value_heads", default=heads)))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(float(number(config, "rms_norm_eps")))
    writer.add_vocab_size(int(number(config, "vocab_size")))
    parameters = rope(config)
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    _describe_scaling(writer, parameters)


def _describe_scaling(writer: GGUFWriter, parameters: Config) -> None:
    from gguf import RopeScalingType

    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "llama3", "longrope"):  # the last two are tensors
        return
    kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
    if kind not in kinds:
        raise UsageError(
            f"config.json: rope_type {quoted(str(kind))}: expected default, linear, yarn, llama3 or longrope."
        )
    writer.add_rope_scaling_type(kinds[kind])
    writer.add_rope_scaling_factor(float(parameters["factor"]))
    if "original_max_position_embeddings" in parameters:
        writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))
