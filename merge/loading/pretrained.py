"""Loads configs, tokenizers, models and adapters by transformers and peft, from a local directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.checkpoint.files import read_json
from merge.checkpoint.formats import quant_method
from merge.checkpoint.trust import note_unread, permission, refusal
from merge.errors import CheckpointError, MergeError, UsageError, first_line
from merge.loading.causal import check_causal
from merge.loading.complete import check_complete
from merge.needs import QUANTISED, need

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class LoadedModel:
    """`new`: parameters of a head that the checkpoint lacks, which start at random."""

    network: Module
    new: tuple[str, ...] = ()


def library() -> Any:
    """transformers, set up never to prompt on the terminal and to render chat templates within bounds."""
    import transformers
    from transformers import dynamic_module_utils

    from merge.chat.render import bound_templates

    # Some architectures load parts without stating whether code may run; transformers would then wait for an answer for
    # 15 seconds. With 0, which it has for its own tests, it refuses at once.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    bound_templates()
    return transformers


def load_config(path: str) -> PreTrainedConfig:
    """transformers' config of a directory, or of a config.json.

    Raises:
        CheckpointError: transformers does not know the architecture, or needs code that may not run.
    """
    with _explained(path, f"{path}: transformers does not know this model"):
        allowed = permission(path)
        config = library().AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=allowed)
    _check_kernels(config, path)
    return config


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Raises CheckpointError if transformers can load none."""
    with _explained(path, f"{path}: its tokenizer cannot be loaded"):
        allowed = permission(path)
        tokenizer = library().AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=allowed)
    if not allowed:
        note_unread(path)
    return tokenizer


def load_model(
    kind: str,
    path: str,
    *,
    config: PreTrainedConfig | None = None,
    new_heads: bool = False,
    brought: Collection[str] = (),
    **settings: Any,
) -> LoadedModel:
    """A model with all its weights.

    Args:
        kind: a class of transformers that chooses by the config, such as AutoModelForCausalLM.
        config: as load_config gave it, perhaps changed; None: that of the directory.
        new_heads: parameters that belong to one task only may be lacking; they start at random.
        brought: parameters that come from elsewhere afterwards, and so may be lacking.
        settings: of from_pretrained.

    Raises:
        UsageError: a package that the weights' format needs is not installed.
        CheckpointError: it cannot be loaded, or lacks weights of this class, or has others.
    """
    check_needs(path)
    config = load_config(path) if config is None else config
    if kind == CAUSAL:
        check_causal(config, path)
    with _explained(path, f"{path}: transformers cannot load it as {kind}"), _silent():
        allowed = permission(path)
        network, found = getattr(library(), kind).from_pretrained(
            path,
            config=config,
            local_files_only=True,
            trust_remote_code=allowed,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
            **settings,
        )
    if not allowed:
        note_unread(path)
    return LoadedModel(network, check_complete(network, found, path, new_heads=new_heads, brought=brought))


def check_needs(path: str, adapter: str | None = None) -> None:
    """Raises UsageError for a package that loading a model, or the adapter for it, needs and that is not installed."""
    if adapter is not None and os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        need(f"{adapter}: an adapter", "finetune", "peft")
    file = os.path.join(path, "config.json")
    method = quant_method(read_json(file, unique=False)) if os.path.isfile(file) else None
    if method in QUANTISED:
        need(f"{path}: loading weights quantised by {method}", "quantize", *QUANTISED[method])


def model_from_config(kind: str, config: PreTrainedConfig, path: str, **settings: Any) -> Module:
    """A model of a config, with random weights, or none on the meta device.

    Args:
        kind: a class of transformers: one that chooses by the config, or a model's own.
        path: where the config comes from.
    """
    with _explained(path, f"{path}: transformers cannot make a model of this config"):
        made = getattr(library(), kind)
        if hasattr(made, "from_config"):
            return made.from_config(config, trust_remote_code=permission(path), **settings)
        return made._from_config(config, **settings)


def own_class(config: PreTrainedConfig) -> str:
    """The class that config.json names if transformers has it, else the one that chooses a causal language model."""
    classes = getattr(config, "architectures", None)
    named = str(classes[0]) if isinstance(classes, list) and classes else ""
    return named if hasattr(getattr(library(), named, None), "_from_config") else CAUSAL


def load_adapter(network: Module, folder: str, trainable: bool = False) -> Module:
    """A model with a PEFT adapter in it. Weights are safetensors, or pickles read as weights only.

    Raises:
        CheckpointError: the adapter does not fit the model, or is damaged.
    """
    from peft import PeftModel

    with _explained(folder, f"{folder}: this adapter cannot be put into the model"):
        return PeftModel.from_pretrained(network, folder, is_trainable=trainable)


def adapter_settings(folder: str) -> PeftConfig:
    """PEFT's config of an adapter's directory."""
    from peft import PeftConfig

    with _explained(folder, f"{folder}: peft cannot read this adapter"):
        return PeftConfig.from_pretrained(folder)


def adapter_weights(folder: str) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter, on the CPU."""
    from peft.utils.save_and_load import load_peft_weights

    with _explained(folder, f"{folder}: peft cannot read this adapter"):
        found: dict[str, Tensor] = load_peft_weights(folder, device="cpu")
        return found


@contextlib.contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Turns any error of the libraries into a CheckpointError of one line."""
    try:
        yield
    except (MergeError, MemoryError):
        raise
    except ImportError as error:
        raise refusal(path, error) or UsageError(f"{what} ({first_line(error)}).") from error
    except Exception as error:  # tokenizers raises bare ones, and transformers any
        raise refusal(path, error) or CheckpointError(f"{what} ({first_line(error)}).") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences the progress bar and the report of missing weights, which become our own error."""
    logging = library().utils.logging
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_kernels(config: PreTrainedConfig, path: str) -> None:
    """Refuses an attention implementation ORG/NAME: it is code from the hub."""
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ())))
    for part in parts:
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, key, None)
            if isinstance(value, str) and "/" in value:
                raise CheckpointError(
                    f'{path}: {key.removeprefix("_")}: "{value:.100}" is code of the hub, which is not run. Remove the '
                    "key from config.json."
                )
