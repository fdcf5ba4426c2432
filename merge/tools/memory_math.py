"""Memory of weights, gradients, optimizer states, adapters and key-value caches: closed forms, no torch.

    inference            weights x 1.2 (EleutherAI, Transformer Math 101), or weights + cache + activations
    full fine-tuning     weights + gradients + states + activations
    LoRA                 weights + (adapter + its gradients and states) + activations
    one adapted matrix   r (in + out) parameters (Hu et al., LoRA, arXiv:2106.09685, section 4.1)
    key-value cache      2 x layers x batch x tokens x KV heads x head size; with multi-head latent attention one latent
                         vector and one rotary key a token (DeepSeek-V2, arXiv:2405.04434, section 2.1)

What activations take depends on how each architecture is written; `merge.tools.memory_trace` counts them in one step of
the real code. All sizes are bytes; GB is 10^9, as model sizes are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge.architecture import is_embedding, is_head
from merge.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]

RULE_OF_THUMB = 1.2

# Bytes of one number; the 4-bit formats and INT8 have scales on top, see `weight_bytes`.
DTYPE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "nf4": 0.5,
}
OPTIMIZERS = ("adamw", "adam8bit", "sgd", "adafactor", "lion")
_SMALLEST_8BIT = 4096  # elements: bitsandbytes keeps the states of smaller tensors in float32
_BLOCK_8BIT = 256
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# (GB on the box, MiB that the driver reports of the smallest of these cards, names). Boards with error correction, and
# "80 GB" of 80 x 10^9 bytes, have less than the box says in GiB.
CARDS = (
    (8, 8188, "RTX 4060, RTX 3070"),
    (12, 12282, "RTX 3060, RTX 4070"),
    (16, 15360, "T4, V100, RTX 4080"),
    (24, 23028, "RTX 3090, RTX 4090, L4, A10"),
    (32, 32510, "RTX 5090, V100 32"),
    (40, 40536, "A100 40"),
    (48, 46068, "A6000, L40S, RTX 6000 Ada"),
    (80, 81559, "A100 80, H100"),
    (96, 97871, "RTX PRO 6000, GH200 96"),
    (141, 143771, "H200"),
    (192, 183359, "B200, MI300X"),
)
CONTEXT_MIB = 500  # taken by CUDA and its libraries before the first tensor; 300 to 600 by card and version

_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)([KMBT]?)", re.IGNORECASE)
_POWERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int | None:
    """A number of parameters: "13B", "135M", "7e9"; None for anything else, such as the name of a directory."""
    match = _NUMBER.fullmatch(text.strip())
    return round(float(match[1]) * _POWERS[match[2].upper()]) if match else None


def unknown_shapes(n_parameters: int) -> Shapes:
    """A model known only by its number of parameters."""
    return {"parameters": (n_parameters,)}


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is quantised and adapted: a matrix that is neither embedding nor head."""
    return len(shape) == 2 and name.endswith("weight") and not is_embedding(name) and not is_head(name)


def weight_bytes(shapes: Shapes, dtype: str, double_quant: bool = False) -> int:
    """Bytes of the weights, scales included.

    Quantised formats hold linear layers, and leave embeddings, heads and vectors in 16 bits; of a model without shapes
    all is, and scales are left out. NF4: a float32 scale for 64 numbers (Dettmers et al., QLoRA,
    arXiv:2305.14314, section 3), with `double_quant` an 8-bit one and a float32 for 256 of them; INT8, FP8: a float32
    for each row; INT4: a 16-bit one for 128 numbers.
    """
    each = DTYPE_BYTES[dtype]
    if each > 1 or list(shapes) == ["parameters"]:
        return round(count(shapes) * each)
    total = 0.0
    for name, shape in shapes.items():
        n = math.prod(shape)
        if not is_linear(name, shape):
            total += 2 * n
        elif dtype == "nf4":
            blocks = -(-n // 64)
            total += n / 2 + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)
        elif dtype == "int4":
            total += n / 2 + 2 * shape[0] * -(-shape[1] // 128)
        else:
            total += n + 4 * shape[0]
    return round(total)


def optimizer_bytes(optimizer: str, shapes: Shapes, itemsize: float) -> int:
    """Bytes of an optimizer's states for trainable tensors of these shapes.

    adamw: two numbers a parameter of `itemsize` bytes; lion: one; sgd: none (no momentum); adam8bit: two bytes and the
    scales of blocks of 256; adafactor: float32 sums of rows and columns of each matrix (Shazeer and Stern,
    arXiv:1804.04235, section 3).

    Raises:
        UsageError: adafactor of a model whose shapes are not known.
    """
    if optimizer == "adamw":
        return round(2 * itemsize * count(shapes))
    if optimizer == "lion":
        return round(itemsize * count(shapes))
    if optimizer == "sgd":
        return 0
    if optimizer == "adam8bit":
        sizes = [math.prod(shape) for shape in shapes.values()]
        return sum(8 * n if n < _SMALLEST_8BIT else 2 * (n + 4 * -(-n // _BLOCK_8BIT)) for n in sizes)
    if list(shapes) == ["parameters"]:
        raise UsageError("--optimizer adafactor: its states follow the shapes of the matrices. Name a config.json.")
    return sum(
        4 * (math.prod(s) if len(s) < 2 else math.prod(s[:-1]) + math.prod(s[:-2]) * s[-1]) for s in shapes.values()
    )


def lora_shapes(shapes: Shapes, rank: int, targets: Sequence[str] = ("all-linear",)) -> dict[str, tuple[int, ...]]:
    """The adapter's matrices: A (rank, in) and B (out, rank) of every linear layer that a target names.

    Args:
        targets: last parts of module names ("q_proj", "mlp.down_proj"), or "all-linear".

    Raises:
        UsageError: a target that names no linear layer; it says which there are.
    """
    modules = {name.removesuffix(".weight"): s for name, s in shapes.items() if is_linear(name, s)}
    found: dict[str, tuple[int, ...]] = {}
    for target in targets:
        chosen = [name for name in modules if target == "all-linear" or f".{name}".endswith(f".{target}")]
        if not chosen:
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules)) or "none"
            raise UsageError(f'--targets: no linear layer is named "{target}". Found: {there}.')
        for name in chosen:
            out, inner = modules[name]
            found |= {f"{name}.lora_A.weight": (rank, inner), f"{name}.lora_B.weight": (out, rank)}
    return found


def kv_cache_bytes(config: Mapping[str, Any], *, batch: int, context: int, itemsize: float) -> int:
    """Bytes of the keys and values of all layers for `batch` sequences of `context` tokens.

    Layers with a sliding window keep no more tokens than it holds; layers of linear attention, whose state does not
    grow with the context, are not counted. With multi-head latent attention it is the compressed latent, as serving
    engines keep it.

    Args:
        config: config.json of the (text) model; what is missing has the defaults of Llama.
    """
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["full_attention"] * layers
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if not config.get("layer_types") and window:
        kinds = ["sliding_attention"] * layers
    tokens = 0
    for kind in kinds:
        if "sliding" in kind or "chunked" in kind:
            tokens += min(context, window or config.get("attention_chunk_size") or context)
        elif kind == "full_attention":
            tokens += context
    return round(batch * tokens * _kv_numbers(config) * itemsize)


def _kv_numbers(config: Mapping[str, Any]) -> int:
    """Numbers that one layer caches for one token."""
    if config.get("kv_lora_rank"):
        return int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * kv_heads * int(config.get("head_dim") or config["hidden_size"] // heads)


def fits(n_bytes: float) -> list[tuple[int, float, str, bool]]:
    """(GB on the box, GiB that tensors can have, names, whether it holds so many bytes) of each card."""
    usable = [(size, (mib - CONTEXT_MIB) / 1024, names) for size, mib, names in CARDS]
    return [(size, gib, names, n_bytes <= gib * 2**30) for size, gib, names in usable]


_EXPERT = re.compile(r"\.experts?\.")


def active(shapes: Shapes, config: Mapping[str, Any]) -> int | None:
    """Active parameters of a mixture of experts; None for other models."""
    chosen = next(
        (config[key] for key in ("num_experts_per_tok", "moe_topk", "top_k_experts") if config.get(key)), None
    )
    experts = {name: shape for name, shape in shapes.items() if _EXPERT.search(f".{name}.")}
    number = next((config[key] for key in _EXPERT_COUNTS if config.get(key)), None)
    if not (chosen and number and experts):
        return None
    routed = count(experts)
    return count(shapes) - routed + round(routed * int(chosen) / int(number))


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
