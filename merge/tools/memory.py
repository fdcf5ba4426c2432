"""estimate: predicts the memory that a model takes for a task, part by part."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import CheckpointError, UsageError
from merge.tools import memory_math as math_
from merge.tools.memory_math import DTYPE_BYTES, Shapes

TASKS = ("inference", "full", "lora", "qlora", "merge")
_DEFAULT_CONTEXT = 2048
_QUANTISED = [name for name, n_bytes in DTYPE_BYTES.items() if n_bytes <= 1]


@dataclass(frozen=True)
class Request:
    """The task and its settings.

    Attributes:
        dtype: of the weights; None: as merge finetune trains on this device, and for inference the config's, else
            bfloat16. A quantised one for inference only.
        device: cpu or cuda. merge finetune trains float32 weights; on a GPU it computes in bfloat16, and weights that
            are frozen are bfloat16 too.
        accumulation: gradients of several batches are added up, so that they stay beside the activations of the next.
        context, batch: tokens of a sequence, and sequences at once; None: 2048 or what the model takes, and 1.
        master_weights: full training in 16 bits with float32 master weights and states (Rajbhandari et al., ZeRO,
            arXiv:1910.02054, section 3.1).
    """

    task: str = "inference"
    dtype: str | None = None
    context: int | None = None
    batch: int | None = None
    optimizer: str = "adamw"
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    checkpointing: bool = False
    accumulation: bool = False
    master_weights: bool = False
    double_quant: bool = True
    device: str = "cuda"

    @property
    def trains(self) -> bool:
        return self.task in ("full", "lora", "qlora")

    @property
    def training_dtype(self) -> str:
        """Dtype of the weights: that of merge finetune for `dtype: auto`."""
        if self.dtype is not None:
            return self.dtype
        frozen = self.task != "full"
        return "bfloat16" if self.master_weights or (frozen and self.device == "cuda") else "float32"


@dataclass(frozen=True)
class Estimate:
    """`parts`: (name, bytes), whose sum is `total`. `notes`: what it does not include."""

    model: str
    task: str
    dtype: str
    parameters: int
    trainable: int
    parts: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    context: int | None = None
    batch: int | None = None

    @property
    def total(self) -> int:
        return sum(n_bytes for _, n_bytes in self.parts)


def estimate(model: str, request: Request) -> Estimate:
    """Memory that `request` takes with a model.

    Args:
        model: a directory, hub id in the cache, config.json, or a number of parameters such as 13B.

    Raises:
        UsageError: settings that exclude each other, or that need a config where there is only a number.
        CheckpointError: the model cannot be read.
    """
    parameters = math_.parse_count(model)
    if parameters is not None and not os.path.exists(model):
        if parameters == 0:
            raise UsageError(f'"{model}": expected a number of parameters above 0.')
        dtype = request.training_dtype if request.trains else request.dtype or "bfloat16"
        subject = _Subject(model, math_.unknown_shapes(parameters), None, dtype, request)
    else:
        subject = _read(model, request)
    if request.trains and subject.dtype in _QUANTISED:
        raise UsageError(
            f"--dtype {subject.dtype}: weights of this type cannot be trained. Use --task qlora, or a float dtype."
        )
    return _TASKS[request.task](subject)


@dataclass(frozen=True)
class _Subject:
    """A model whose shapes are known; `config` is transformers', None for a number of parameters."""

    name: str
    shapes: Shapes
    config: Any
    dtype: str
    request: Request

    @property
    def compute_dtype(self) -> str:
        return "bfloat16" if self.dtype in _QUANTISED else self.dtype

    @property
    def weights(self) -> int:
        return math_.weight_bytes(self.shapes, self.dtype)

    @property
    def batch(self) -> int:
        return self.request.batch or 1

    @property
    def context(self) -> int:
        """Raises UsageError for more tokens than the model has learned positions for."""
        text = self.config.get_text_config()
        most = getattr(text, "max_position_embeddings", None) or _DEFAULT_CONTEXT
        context = self.request.context or min(_DEFAULT_CONTEXT, most)
        if context > most and getattr(text, "rope_parameters", None) is None:
            raise UsageError(f"--context {context:,}: {self.name} has {most:,} positions.")
        return context

    def result(self, parts: dict[str, int], trainable: int = 0, *notes: str) -> Estimate:
        known = self.config is not None and self.request.task != "merge"
        if self.config is not None and (active := math_.active(self.shapes, self.config.get_text_config().to_dict())):
            notes = (*notes, f"mixture of experts: {active:,} parameters work on each token")
        return Estimate(
            self.name,
            self.request.task,
            self.dtype,
            math_.count(self.shapes),
            trainable,
            tuple(parts.items()),
            notes,
            self.context if known else None,
            self.batch if known else None,
        )


def _inference(subject: _Subject) -> Estimate:
    rule = round(subject.weights * math_.RULE_OF_THUMB)
    if subject.config is None:
        _needs_config(subject, "context", "batch")
        parts = {"weights": subject.weights, "cache and activations (rule of thumb, 20 %)": rule - subject.weights}
        return subject.result(parts)
    from merge.tools.memory_trace import trace_inference

    trace = trace_inference(subject.config, dtype=subject.compute_dtype, batch=subject.batch, context=subject.context)
    text = subject.config.get_text_config().to_dict()
    working = trace.peak - trace.weights
    cache = 0
    if "num_hidden_layers" in text and "num_attention_heads" in text:
        itemsize = DTYPE_BYTES[subject.compute_dtype]
        cache = min(
            working, math_.kv_cache_bytes(text, batch=subject.batch, context=subject.context, itemsize=itemsize)
        )
    parts = {"weights": subject.weights, "key-value cache": cache, "activations and logits": working - cache}
    if subject.dtype in _QUANTISED:
        parts["largest matrix, dequantised"] = _largest_linear(subject.shapes)
    return subject.result(parts, 0, f"rule of thumb, weights x {math_.RULE_OF_THUMB}: {rule / 1e9:.3g} GB")


def _full(subject: _Subject) -> Estimate:
    each, n = DTYPE_BYTES[subject.dtype], math_.count(subject.shapes)
    master = subject.request.master_weights and each < 4
    states = math_.optimizer_bytes(subject.request.optimizer, subject.shapes, 4 if master else each)
    parts = {"weights": subject.weights, "gradients": round(n * each), "optimizer states": states}
    if master:
        parts["master weights, float32"] = 4 * n
    notes = []
    if each == 4 and subject.request.dtype is None:
        half = 4 * n + math_.optimizer_bytes(subject.request.optimizer, subject.shapes, 2)
        notes = [
            f"merge finetune trains in float32; in 16 bits throughout, as textbooks count: {half / 1e9:.4g} GB "
            "before activations (--dtype bfloat16)"
        ]
    return _trained(subject, parts, n, *notes)


def _lora(subject: _Subject) -> Estimate:
    if subject.config is None:
        raise UsageError(f"{subject.name}: an adapter's size follows the shapes of the matrices. Name a config.json.")
    adapter = math_.lora_shapes(subject.shapes, subject.request.rank, subject.request.targets)
    n = math_.count(adapter)
    parts = {"weights, frozen": subject.weights}
    if subject.request.task == "qlora":
        parts = _nf4_parts(subject)
    parts |= {
        "adapter, float32": 4 * n,
        "gradients": 4 * n,
        "optimizer states": math_.optimizer_bytes(subject.request.optimizer, adapter, 4),
    }
    if subject.request.task == "qlora":
        parts["largest matrix, dequantised"] = _largest_linear(subject.shapes)
    return _trained(subject, parts, n)


def _nf4_parts(subject: _Subject) -> dict[str, int]:
    """bitsandbytes quantises linear layers: experts that a class holds in one tensor stay in 16 bits."""
    from merge.tools.memory_trace import parameter_shapes

    shapes = parameter_shapes(subject.config)  # as the class has them, and not as they are stored
    experts = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    others = {name: shape for name, shape in shapes.items() if name not in experts}
    parts = {"weights, frozen, NF4": math_.weight_bytes(others, "nf4", subject.request.double_quant)}
    if experts:
        parts["experts, frozen, not quantised: 16 bits"] = 2 * math_.count(experts)
    return parts


def _trained(subject: _Subject, parts: dict[str, int], trainable: int, *notes: str) -> Estimate:
    """`parts` and the activations: what the step takes at its peak more than they are."""
    if subject.config is None:
        _needs_config(subject, "context", "batch")
        return subject.result(parts, trainable, *notes, "before activations: those need a config.json")
    from merge.tools.memory_trace import Lora, trace_training

    adapted = subject.request.task != "full"
    trace = trace_training(
        subject.config,
        dtype=subject.compute_dtype,
        batch=subject.batch,
        context=subject.context,
        lora=Lora(subject.request.rank, subject.request.targets) if adapted else None,
        checkpointing=subject.request.checkpointing,
        mixed=not adapted and subject.request.device == "cuda" and subject.dtype == "float32",
    )
    # Activations are at their most when gradients are few: they share the room of both, unless those of earlier batches
    # are there. While the optimizer works, activations are gone, and it needs two numbers for each one of the largest
    # tensor.
    gradients = trace.trainable_bytes
    before = gradients if subject.request.accumulation else 0
    working = max(trace.peak - trace.weights + before, gradients + 2 * trace.largest)
    parts = parts | {"activations, beyond the room of gradients": working - gradients}
    return subject.result(parts, trainable, *notes)


def _merge(subject: _Subject) -> Estimate:
    from merge.engine.memory import budget
    from merge.plan import Plan, Step, Stored

    if subject.dtype in ("int8", "int4", "nf4"):
        raise UsageError(f"--dtype {subject.dtype}: merges are of float weights.")
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8": "F8_E4M3"}[subject.dtype]
    shapes = subject.shapes if subject.config is not None else {"parameters": (8192, 8192)}
    parameters = {"weight": (1.0,) * 3, "density": (0.5,) * 3}

    def step(name: str, shape: tuple[int, ...]) -> Step:
        ref = Stored(name, stored, shape, "", 0)
        return Step(name, shape, stored, "", 0, "ties", (ref,) * 3, (1, 2, 3), ref, 0, parameters)

    steps = tuple(step(name, shape) for name, shape in shapes.items())
    peak = budget(Plan("", "ties", 0, (), 0, steps, (), ()), None, None).peak
    note = "ties of a base and three fine-tunes on all processors; `merge plan RECIPE` shows it for your recipe"
    return subject.result({"merge run, for any size of model": peak}, 0, note)


_TASKS: dict[str, Callable[[_Subject], Estimate]] = {
    "inference": _inference,
    "full": _full,
    "lora": _lora,
    "qlora": _lora,
    "merge": _merge,
}


def _needs_config(subject: _Subject, *flags: str) -> None:
    for flag in flags:
        if getattr(subject.request, flag) is not None:
            raise UsageError(f"--{flag}: {subject.name} is only a number of parameters. Name a config.json or a model.")


def _largest_linear(shapes: Shapes) -> int:
    """Bytes of the largest quantised matrix in 16 bits, in which it is multiplied."""
    return max((2 * s[0] * s[1] for name, s in shapes.items() if math_.is_linear(name, s)), default=0)


def _read(model: str, request: Request) -> _Subject:
    from merge.loading import load_config
    from merge.tools.memory_trace import parameter_shapes

    path = _config_path(model)
    config = load_config(path)
    shapes: Shapes = _stored_shapes(path) or parameter_shapes(config)
    found = str(getattr(config.get_text_config(), "dtype", None) or "bfloat16").removeprefix("torch.")
    dtype = request.dtype or (found if found in DTYPE_BYTES else "bfloat16")
    return _Subject(model, shapes, config, request.training_dtype if request.trains else dtype, request)


def _config_path(model: str) -> str:
    """A directory with a config.json, or that file itself."""
    path = Path(model).expanduser()
    if path.is_file():
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            from merge.adapters.files import refuse_alone

            refuse_alone(str(path))
            raise CheckpointError(f"{path}: has no config.json. Name a model's directory, or the file itself.")
        return str(path)
    import huggingface_hub

    from merge.checkpoint.hub import locate
    from merge.recipe.references import parse_model_path

    try:
        ref = parse_model_path(model)
    except ValueError as error:
        raise UsageError(f"{error}, or a number of parameters such as 13B.") from None
    if "/" in ref.path:  # a config alone is enough
        cached = huggingface_hub.try_to_load_from_cache(ref.path, "config.json", revision=ref.revision)
        if isinstance(cached, str):
            return str(Path(cached).parent)
    return locate(ref).path


def _stored_shapes(path: str) -> Shapes | None:
    """Shapes from the headers of the weights; None if there are none, or they are packed."""
    from merge.checkpoint import open_checkpoint
    from merge.checkpoint.files import read_json
    from merge.checkpoint.layout import find_weights
    from merge.recipe.model import ModelRef

    if not os.path.isdir(path) or read_json(os.path.join(path, "config.json"), unique=False).get("quantization_config"):
        return None
    try:
        find_weights(path)
    except CheckpointError:
        return None
    tensors = open_checkpoint(ModelRef(path, path)).tensors
    return {name: ref.shape for name, ref in tensors.items()}
