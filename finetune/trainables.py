"""Ways of training, in one table: each is a function that prepares the loaded model, and a few facts.

To add one: its name in finetune/keys.py, a function here, a line in TRAINABLES.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.adapters import put_adapter
from finetune.keys import _LORA, Config
from finetune.partial import choose_parameters
from merge.errors import UsageError
from merge.quoting import excerpt
from merge.schema.names import suggest

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Trainable:
    """One way of training.

    what: what is trained, for the documents.
    prepare: (model, config, task type of PEFT, new token ids) -> the model to train, with requires_grad set.
    adapter: the result is an adapter beside the base, not a model.
    checkpointing: can be combined with gradient checkpointing.
    """

    what: str
    prepare: Callable[[Module, Config, str | None, list[int]], Module]
    learning_rate: float
    adapter: bool = True
    checkpointing: bool = True
    paper: str = ""


def make_trainable(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    """The model in which only the parameters that the config names are trained, and new ones, such as a head.

    Raises:
        UsageError: nothing is left, a pattern or module fits nothing, or PEFT does not know the architecture.
    """
    kind = TRAINABLES[config.train]
    if config.gradient_checkpointing and not kind.checkpointing:
        raise UsageError(f"train: {config.train} cannot be combined with gradient_checkpointing; change one of them.")
    if new_ids and kind.adapter and config.train not in ("lora", "qlora"):
        raise UsageError(f"new_tokens: train: {config.train} does not train embeddings; use lora, qlora or full.")
    new = list(getattr(model, "new_parameters", ()))
    saves_new = not kind.adapter or config.train == "bottleneck"
    if new and not saves_new and not config.adapter:
        config = _with_heads(config, task_type, new)
    if not config.adapter:
        _check_names(model, config)
    try:
        model = put_adapter(model, config) if config.adapter else kind.prepare(model, config, task_type, new_ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"train: {config.train} does not fit this model: {excerpt(str(error).strip())}") from error
    model.new_parameters = new
    if config.gradient_checkpointing:
        _let_gradients_in(model)
    if saves_new:
        for name, parameter in model.named_parameters():
            if name in new:
                parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"train: {config.train} leaves nothing to train in this model. {_NOTHING.get(config.train, '')}"
        )
    return model


_HEADS = ("classifier", "score")  # PEFT trains these itself in classification


def _with_heads(config: Config, task_type: str | None, new: list[str]) -> Config:
    """With the modules of new parameters in modules_to_save: an adapter is of no use without them."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in new)
    own = [name for name in modules if not any(part in _HEADS for part in name.split("."))]
    if task_type == "FEATURE_EXTRACTION":
        return config  # a pooler, which the mean of hidden states does not use
    if task_type != "SEQ_CLS" or (own and config.train not in (*_LORA, "ia3")):
        raise UsageError(
            f"train: {config.train} does not train {new[0]}, which is new to the base; use lora, bottleneck or full."
            if task_type == "SEQ_CLS"
            else f"the base lacks {new[0]}, so there is nothing for an adapter to start from; use train: full."
        )
    return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *own))


_NOTHING = {
    "bitfit": "It has no biases (Llama and most of its kin have none); use lora.",
    "partial": "Look at freeze_first, train_last, freeze and train_only.",
}


def count_parameters(model: Module) -> tuple[int, int]:
    """(trained, all). PEFT counts what is behind 4-bit storage."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _let_gradients_in(model: Module) -> None:
    """A checkpointed block needs an input with a gradient, and frozen embeddings give none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters()):
        base.enable_input_require_grads()


def _full(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    return model.requires_grad_(True)


def _bitfit(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _lora(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type=task_type,
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        rank_pattern={name: int(rank) for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern=dict(config.alpha_pattern or {}),
        target_modules=list(config.target_modules) or "all-linear",
        modules_to_save=list(config.modules_to_save) or None,
        trainable_token_indices=_token_rows(model, config, new_ids),
        ensure_weight_tying=_trains_tied(model, config),
    )
    _check_patterns(model, config)
    return get_peft_model(model, settings)


def _trains_tied(model: Module, config: Config) -> bool:
    """modules_to_save names embeddings that are the head too, so both have to stay one."""
    head = model.get_output_embeddings()
    words = model.get_input_embeddings()
    if head is None or head.weight is not words.weight:
        return False
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if module is head or module is words)
    return any(name in config.modules_to_save for name in names)


def _token_rows(model: Module, config: Config, new_ids: list[int]) -> dict[str, list[int]] | None:
    """The rows of new tokens in the embeddings, and in a head of its own; or None if these are trained whole."""
    if not new_ids:
        return None
    modules = dict(model.named_modules())
    wanted = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not wanted[0].weight:
        wanted.append(head)
    names = [next(name for name, module in modules.items() if module is one) for one in wanted]
    left = [name for name in names if name.rpartition(".")[2] not in config.modules_to_save]
    return {name.rpartition(".")[2]: new_ids for name in left} or None


def _check_names(model: Module, config: Config) -> None:
    """PEFT requires only one matching name, and would silently ignore the others."""
    modules = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        for word in getattr(config, key):
            if not any(f".{name}".endswith(f".{word}") for name in modules):
                known = list(dict.fromkeys(name.rpartition(".")[2] for name in modules if not name[-1].isdigit()))
                raise UsageError(f'{key}: no module of this model is called "{word}"; {suggest(word, known)}')


def _check_patterns(model: Module, config: Config) -> None:
    """A pattern that matches no module would silently leave its rank unused."""
    names = [name for name, _ in model.named_modules()]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (getattr(config, key) or {}).items():
            try:
                fits = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
            except re.error as error:
                raise UsageError(f'{key}: "{pattern}" is not a regular expression ({error}).') from None
            if not fits:
                raise UsageError(f'{key}: no module matches "{pattern}"; write for example "q_proj" or ".*mlp.*".')
            if key == "rank_pattern" and value != int(value):
                raise UsageError(f'{key}: the rank of "{pattern}" must be a whole number, not {value:g}.')


def _qlora(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import prepare_model_for_kbit_training

    # Checkpointing is switched on by the trainer, as for every other way.
    return _lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), config, task_type, new_ids)


def _ia3(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import IA3Config, get_peft_model

    targets, inner = list(config.target_modules) or None, list(config.feedforward_modules) or None
    if targets and inner is None:
        inner = []
    settings = IA3Config(
        task_type=task_type,
        target_modules=targets,
        feedforward_modules=inner,
        modules_to_save=list(config.modules_to_save) or None,
    )
    return get_peft_model(model, settings)


def _prompt(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    start: dict[str, object] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
    if config.prompt_init is not None:
        start = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": config.prompt_init,
            "tokenizer_name_or_path": model.config.name_or_path,
        }
    return get_peft_model(
        model, PromptTuningConfig(task_type=task_type, num_virtual_tokens=config.virtual_tokens, **start)
    )


def _prefix(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import PrefixTuningConfig, get_peft_model

    settings = PrefixTuningConfig(
        task_type=task_type,
        num_virtual_tokens=config.virtual_tokens,
        prefix_projection=config.encoder_hidden is not None,
        encoder_hidden_size=config.encoder_hidden,
    )
    return get_peft_model(model, settings)


def _ptuning(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from peft import PromptEncoderConfig, get_peft_model

    settings = PromptEncoderConfig(
        task_type=task_type, num_virtual_tokens=config.virtual_tokens, encoder_hidden_size=config.encoder_hidden or 128
    )
    return get_peft_model(model, settings)


def _bottleneck(model: Module, config: Config, task_type: str | None, new_ids: list[int]) -> Module:
    from merge.loading.bottleneck import add_bottlenecks

    add_bottlenecks(model, config.bottleneck, config.target_modules)
    return model


TRAINABLES: dict[str, Trainable] = {
    "full": Trainable("all weights", _full, 2e-5, adapter=False),
    "partial": Trainable("some layers or weights, by number or name", choose_parameters, 2e-5, adapter=False),
    "bitfit": Trainable("biases", _bitfit, 1e-3, adapter=False, paper="arXiv:2106.10199"),
    "lora": Trainable("low-rank factors beside linear layers", _lora, 2e-4, paper="arXiv:2106.09685"),
    "qlora": Trainable("the same over a base in NF4; slow on CPU", _qlora, 2e-4, paper="arXiv:2305.14314"),
    "ia3": Trainable("scales of keys, values and inner activations", _ia3, 3e-3, paper="arXiv:2205.05638"),
    "prompt": Trainable("embeddings before the text", _prompt, 1e-2, paper="arXiv:2104.08691"),
    "prefix": Trainable(
        "keys and values before the text, in every layer", _prefix, 1e-2, checkpointing=False, paper="arXiv:2101.00190"
    ),
    "ptuning": Trainable(
        "embeddings before the text, made by a small network", _ptuning, 1e-2, paper="arXiv:2103.10385"
    ),
    "bottleneck": Trainable(
        "Houlsby adapters after attention and MLP; they start as no change", _bottleneck, 1e-3, paper="arXiv:1902.00751"
    ),
}
