"""What llama.cpp calls an architecture and its numbers: one file a family. Adding a file adds a family.

Names and meanings of metadata are llama.cpp's (its GGUF specification, the constants of the gguf package).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.errors import CheckpointError, UsageError
from merge.quoting import quoted

if TYPE_CHECKING:
    from gguf import GGUFWriter

Config = Mapping[str, Any]
_ROTATED = re.compile(r"\.[qk]_proj\.(weight|bias)$")
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
        names: what the tensors of a layer are called in llama.cpp -> in transformers, beside LAYER; {e} is an expert.
        config: adds to what `config_of` makes of the metadata, whose keys here lack the architecture's name.
    """

    arch: str
    classes: tuple[str, ...]
    describe: Describe = lambda writer, config: None
    permuted: bool = False
    norm_plus_one: bool = False
    extra: Callable[[Config], Mapping[str, list[float]]] = lambda config: {}
    names: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Config], dict[str, Any]] = lambda metadata: {}

    def rotates(self, name: str) -> bool:
        """Whether rows of this tensor of transformers change places."""
        return self.permuted and _ROTATED.search(name) is not None

    def added(self, name: str) -> float:
        """What is added to this tensor of transformers for llama.cpp."""
        return 1.0 if self.norm_plus_one and name.endswith("norm.weight") else 0.0


OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def family_named(arch: str, path: str) -> Family:
    """Raises UsageError for an architecture of llama.cpp that no family has."""
    known = {family.arch: family for family in _families()}
    if arch not in known:
        raise UsageError(
            f"{path}: general.architecture: found {quoted(arch)}; GGUF files are read of {', '.join(sorted(known))}. "
            "Name the original model."
        )
    return known[arch]


def config_of(metadata: Config, n_tokens: int, tied: bool) -> dict[str, Any]:
    """config.json of what `described` describes; metadata: keys without the architecture's name."""
    heads = int(metadata["attention.head_count"])
    hidden = int(metadata["embedding_length"])
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.get("rope.freq_base", 10000.0))}
    if (kind := metadata.get("rope.scaling.type", "none")) != "none":
        parameters |= {"rope_type": str(kind), "factor": float(metadata["rope.scaling.factor"])}
        if "rope.scaling.original_context_length" in metadata:
            parameters["original_max_position_embeddings"] = int(metadata["rope.scaling.original_context_length"])
    return {
        "vocab_size": n_tokens,
        "hidden_size": hidden,
        "intermediate_size": int(metadata["feed_forward_length"]),
        "num_hidden_layers": int(metadata["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get("attention.head_count_kv", heads)),
        "head_dim": int(metadata.get("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(metadata["context_length"]),
        "rms_norm_eps": float(f"{metadata['attention.layer_norm_rms_epsilon']:.6g}"),  # it was written as a float32
        "rope_parameters": parameters,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


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
    found = [importlib.import_module(f"{__name__}.{name}") for name in modules]
    return [family for module in found for family in getattr(module, "FAMILIES", ())]


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
