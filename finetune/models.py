"""The model to train: locates its files, tokenizer and context, and loads it by the config."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.keys import Config
from finetune.sources import SourceStates, model_sources
from merge.checkpoint.formats import quant_method
from merge.checkpoint.hub import ModelPlace, locate
from merge.errors import CheckpointError, UsageError
from merge.loading import CAUSAL, known_as, load_config, load_tokenizer, remember_name
from merge.loading import load_model as load_weights
from merge.loading.libraries import keep_4_bit_layout
from merge.recipe.references import parse_reference

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """A located model with its config and tokenizer, without weights.

    Attributes:
        context: tokens; None if it has no limit.
        sources: the files it is read from, and those of the adapter being continued.
    """

    path: str
    revision: str | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    sources: SourceStates


def open_base(text: str, folder: Path | None, adapter: str | None = None, key: str = "model") -> Base:
    """Reads config.json and the tokenizer; that of the adapter being continued, if it has one. `key`: of the
    config, which messages name.

    Raises:
        UsageError, CheckpointError: no such model, not one of transformers', without a tokenizer.
    """
    try:
        ref = parse_reference(text, folder)
    except ValueError as error:
        raise UsageError(f"{key}: {error}.") from None
    if ref.adapter is not None:
        raise UsageError(f'{key} "{text}": names an adapter. To continue one: merge finetune continue ADAPTER.')
    place: ModelPlace = locate(ref)
    if not (Path(place.path) / "config.json").is_file():
        raise CheckpointError(f"{place.path}: there is no config.json. Name a directory with a model of transformers.")
    sources = model_sources(text, place.path) + (model_sources(adapter, adapter) if adapter else ())
    config = load_config(place.path)
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if own and adapter else place.path)
    tokenizer.padding_side = "right"
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = context if isinstance(context, int) else None
    return Base(place.path, place.revision, config, tokenizer, limit, sources)


def trained_from(base: Base, path: str) -> Base:
    """The model in `path`, trained from this base, with the base's tokenizer."""
    remember_name(path, known_as(base.path))  # code of the base was copied along
    sources = model_sources(path, path)
    return dataclasses.replace(base, path=path, revision=None, config=load_config(path), sources=sources)


def check_trainable(base: Base, config: Config) -> None:
    """Raises UsageError for quantised weights that this way of training cannot start from."""
    method = quant_method(base.config.to_dict())
    if method is None or (method == "bitsandbytes" and config.train in ("lora", "qlora")):
        return
    what = f"{base.path}: its weights are quantised ({method})"
    if method == "bitsandbytes":
        raise UsageError(f"{what}, so train: {config.train} cannot change them. Use train: lora or qlora.")
    raise UsageError(
        f"{what}, which cannot be trained, not even under an adapter. Start from what "
        f"`merge convert {base.path} -o MODEL --dequantize --dtype bfloat16` writes, or from the "
        "model that it was made from."
    )


def load_model(
    base: Base, config: Config, model_class: str, device: str, more: Mapping[str, object] | None = None
) -> PreTrainedModel:
    """The model in memory, in the config's dtype; quantised to NF4 for QLoRA; embeddings for new tokens added.

    `more`: attributes for the model's config. Parameters that the checkpoint lacks, or has for another number of
    labels, are new, drawn by torch's seed, and listed in the model's attribute new_parameters.

    Raises:
        CheckpointError: transformers cannot load it, or it lacks parameters that cannot be initialised.
    """
    settings: dict[str, Any] = {"config": copy.deepcopy(base.config), "attn_implementation": config.attention}
    for name, value in (more or {}).items():
        setattr(settings["config"], name, value)
    if config.train == "qlora" and quant_method(base.config.to_dict()) is None:
        settings |= {"quantization_config": _nf4(config, device), "device_map": {"": local_device(device)}}
    dtype = _dtype(config, device)
    loaded = load_weights(model_class, base.path, new_heads=model_class != CAUSAL, dtype=dtype, **settings)
    model = loaded.network
    model.new_parameters = list(loaded.new)
    keep_4_bit_layout(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(base.tokenizer) > rows:
        if not config.new_tokens and not config.adapter:
            raise CheckpointError(
                f"{base.path}: the tokenizer has {len(base.tokenizer):,} tokens and the model {rows:,} embeddings. "
                "Use the tokenizer the model was made with."
            )
        model.resize_token_embeddings(len(base.tokenizer), mean_resizing=True)
    model.config.use_cache = True  # as saved; training asks for none
    return model


def pick_device(config: Config, asked: str | None) -> str:
    """cpu or cuda. Raises UsageError for a device that is missing, or cannot do what the config asks."""
    import torch

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise UsageError("--device cuda: torch finds no GPU here. Use --device cpu.")
    device = asked or ("cuda" if found else "cpu")
    if device == "cpu" and config.precision == "fp16":
        raise UsageError("precision: fp16 needs a GPU; a CPU trains in fp32 or bf16.")
    if device == "cuda" and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UsageError("precision: this GPU has no bf16; use fp16 or fp32.")
    return device


def mixed_precision(config: Config, device: str) -> str:
    """bf16, fp16 or fp32: the config's precision, with `auto` resolved for the device."""
    import torch

    if config.precision != "auto":
        return config.precision
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def computing(config: Config, device: str) -> contextlib.AbstractContextManager[object]:
    """A context with the precision of training: mixed precision, or none."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(mixed_precision(config, device))  # of cpu or cuda, whichever GPU it is
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _dtype(config: Config, device: str) -> torch.dtype:
    """Converts trained weights to float32: updates are too small for bfloat16. Frozen weights may stay."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    frozen = config.train not in ("full", "partial", "bitfit")
    return torch.bfloat16 if frozen and mixed_precision(config, device) == "bf16" else torch.float32


def _nf4(config: Config, device: str) -> BitsAndBytesConfig:
    """Dettmers et al. 2023 (arXiv:2305.14314): NF4 weights, quantised scales, computation in a float."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=_dtype(config, device),
        llm_int8_skip_modules=[r"(.*\.)?(lm_head|cls|score|classifier|pooler)"],  # heads may be trained in full
    )


def local_device(device: str) -> str:
    """The GPU of this process among those that accelerate launched; or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
