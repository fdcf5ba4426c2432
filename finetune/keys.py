"""The schema of `merge finetune`: every key with its type, range, default and one line of help.

The same table reads the YAML file, makes the command line's flags, and says what belongs to which way of training. A
new key is one line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

# What may be trained, in the order that `--help` shows; finetune/trainables.py does it.
TRAIN = (*("full", "partial", "bitfit", "lora", "qlora", "ia3", "prompt", "prefix", "ptuning", "bottleneck"),)
FORMATS = (
    *(
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "text",
        "preference",
        "kto",
        "anchor_positive",
        "text_label",
    ),
)
# finetune/objectives/ does them
OBJECTIVES = ("supervised", "text", "infilling", "mlm", "classification", "dpo", "kto", "distillation", "embeddings")
SCHEDULERS = (
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd")

_LORA = ("lora", "qlora")
_ADAPTERS = (*_LORA, "ia3", "bottleneck")
_PROMPTS = ("prompt", "prefix", "ptuning")


@dataclass(frozen=True)
class Key:
    """One key. `kind`: str, int, float, bool, words (a list of texts), table (texts to numbers), data or number|words.

    `only`: the ways of training it belongs to, and `objectives`: those; () is all. `low` and `high` are inclusive;
    `above` is exclusive.
    """

    kind: str
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    only: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    group: str = ""


def key(default: Any, kind: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"key": Key(kind, help, **more)})


@dataclass(frozen=True)
class Source:
    """One data set: a file or a hub id, how its columns become an example, and how much of it is used."""

    path: str
    format: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    weight: float | None = None
    task: str | None = None
    ignore_columns: tuple[str, ...] = ()
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything that decides what comes out of a run."""

    model: str = key("", "str", "What to train: a directory or hub id (org/name@revision).", group="What")
    data: tuple[Source, ...] = key(
        (), "data", "A data file (.jsonl .json .csv .parquet .txt) or a hub id; may be repeated.", group="What"
    )
    out: str = key("", "str", "Directory to make.", group="What")
    train: str = key("lora", "str", "What is trained.", choices=TRAIN, group="What")
    objective: str | None = key(
        None, "str", "What is learnt; by default what the data is for.", choices=OBJECTIVES, group="What"
    )
    adapter: str | None = key(None, "str", "An adapter to go on from (merge finetune continue).", group="What")

    format: str | None = key(None, "str", "Of the data; detected by default.", choices=FORMATS, group="Data")
    prompt: str | None = key(None, "str", 'Template, such as "Q: {question}\\nA: ".', group="Data")
    completion: str | None = key(None, "str", 'Template, such as "{answer}".', group="Data")
    text: str | None = key(None, "str", 'Template, such as "{title}\\n{body}".', group="Data")
    chat: bool | None = key(
        None,
        "bool",
        "Put prompts and completions into the chat template, as two turns; default: conversations, and alpaca where "
        "the tokenizer has a template.",
        group="Data",
    )
    ignore_columns: tuple[str, ...] = key((), "words", "Columns of the data that are left out.", group="Data")
    chat_template: str | None = key(None, "str", "A Jinja file, or chatml; default: the tokenizer's.", group="Data")
    validation: float | tuple[Source, ...] | None = key(
        None, "fraction|data", "Held out: a share of the data such as 0.05, or a file.", group="Data"
    )
    prompt_loss_weight: float = key(0.1, "float", "Of prompt tokens; a response's is 1.", low=0, high=1, group="Data")
    last_turn_only: bool = key(False, "bool", "Only the last answer of a conversation counts 1.", group="Data")
    max_length: int | None = key(
        None, "int", "Tokens of a sequence; default: the model's context, at most 2048.", low=2, group="Data"
    )
    too_long: str | None = key(
        None,
        "str",
        "What becomes of longer ones; default: error, and split for text.",
        choices=("error", "truncate", "drop", "split"),
        group="Data",
    )
    packing: bool = key(False, "bool", "Several examples in a sequence, which do not see each other.", group="Data")
    new_tokens: tuple[str, ...] = key((), "words", "Tokens to add to the vocabulary.", group="Data")
    eos_token: str | None = key(None, "str", "Ends an example; default: the tokenizer's.", group="Data")
    pad_token: str | None = key(None, "str", "Fills rows up; default: the tokenizer's, or eos.", group="Data")

    infilling_rate: float = key(
        0.5,
        "float",
        "Share of texts whose middle moves to the end.",
        low=0,
        high=1,
        objectives=("infilling",),
        group="Objectives",
    )
    infilling_tokens: tuple[str, ...] = key(
        (),
        "words",
        "Marks of prefix, suffix and middle; default: the tokenizer's.",
        objectives=("infilling",),
        group="Objectives",
    )
    mask_rate: float = key(
        0.15, "float", "Share of tokens to predict.", above=0, high=0.9, objectives=("mlm",), group="Objectives"
    )
    mask_copies: int = key(
        1, "int", "Differently masked examples of each text.", low=1, objectives=("mlm",), group="Objectives"
    )
    whole_words: bool = key(
        False, "bool", "Mask all tokens of a word, or none.", objectives=("mlm",), group="Objectives"
    )
    labels: tuple[str, ...] = key(
        (), "words", "Names in order; default: as in the data.", objectives=("classification",), group="Objectives"
    )
    class_weights: dict[str, float] | None = key(
        None, "table", "Of losses, by label.", above=0, objectives=("classification",), group="Objectives"
    )
    balance_classes: bool = key(
        False,
        "bool",
        "Make all labels count the same.",
        objectives=("classification",),
        group="Objectives",
    )
    beta: float = key(
        0.1,
        "float",
        "How strongly DPO and KTO are held to their reference.",
        above=0,
        objectives=("dpo", "kto"),
        group="Objectives",
    )
    wanted_weight: float = key(
        1.0, "float", "Of the losses of wanted answers.", above=0, objectives=("kto",), group="Objectives"
    )
    unwanted_weight: float = key(
        1.0, "float", "Of those of unwanted ones.", above=0, objectives=("kto",), group="Objectives"
    )
    label_smoothing: float = key(
        0.0,
        "float",
        "Share of preferences taken for wrong.",
        low=0,
        high=0.5,
        objectives=("dpo",),
        group="Objectives",
    )
    teacher: str | None = key(None, "str", "The model to learn from.", objectives=("distillation",), group="Objectives")
    temperature: float = key(
        2.0, "float", "Of teacher and student.", above=0, objectives=("distillation",), group="Objectives"
    )
    distillation_alpha: float = key(
        0.5,
        "float",
        "Share of the teacher in the loss; the data has the rest.",
        above=0,
        high=1,
        objectives=("distillation",),
        group="Objectives",
    )
    similarity_temperature: float = key(
        0.05, "float", "Cosines are divided by it.", above=0, objectives=("embeddings",), group="Objectives"
    )

    rank: int = key(16, "int", "Of LoRA's matrices.", low=1, only=_LORA, group="Adapters")
    alpha: float | None = key(
        None, "float", "LoRA's scale is alpha/rank; default: 2 rank.", above=0, only=_LORA, group="Adapters"
    )
    dropout: float = key(0.0, "float", "Before LoRA's matrices.", low=0, high=0.99, only=_LORA, group="Adapters")
    rslora: bool = key(False, "bool", "Scale alpha/sqrt(rank).", only=_LORA, group="Adapters")
    dora: bool = key(False, "bool", "Train magnitude and direction (DoRA).", only=_LORA, group="Adapters")
    rank_pattern: dict[str, float] | None = key(
        None, "table", "Ranks by regular expression on module names.", low=1, only=_LORA, group="Adapters"
    )
    alpha_pattern: dict[str, float] | None = key(
        None, "table", "Alphas by regular expression on module names.", above=0, only=_LORA, group="Adapters"
    )
    target_modules: tuple[str, ...] = key(
        (),
        "words",
        "Module names; default: all linear layers (LoRA), the usual ones (others).",
        only=_ADAPTERS,
        group="Adapters",
    )
    feedforward_modules: tuple[str, ...] = key(
        (), "words", "Those of target_modules whose input IA3 scales.", only=("ia3",), group="Adapters"
    )
    modules_to_save: tuple[str, ...] = key(
        (), "words", "Modules trained and saved whole, such as embed_tokens.", only=(*_LORA, "ia3"), group="Adapters"
    )
    double_quantization: bool = key(True, "bool", "Quantise the scales too.", only=("qlora",), group="Adapters")
    virtual_tokens: int = key(
        20, "int", "Length of the learnt prompt or prefix.", low=1, only=_PROMPTS, group="Adapters"
    )
    prompt_init: str | None = key(None, "str", "A text the prompt starts from.", only=("prompt",), group="Adapters")
    encoder_hidden: int | None = key(
        None, "int", "Width of the prompt encoder.", low=1, only=("prefix", "ptuning"), group="Adapters"
    )
    bottleneck: int = key(16, "int", "Width of a bottleneck adapter.", low=1, only=("bottleneck",), group="Adapters")
    freeze_first: int | None = key(
        None, "int", "Freeze embeddings and this many layers.", low=1, only=("partial",), group="Adapters"
    )
    train_last: int | None = key(
        None, "int", "Train this many last layers, final norm and head.", low=1, only=("partial",), group="Adapters"
    )
    freeze: tuple[str, ...] = key(
        (), "words", "Regular expressions of parameters not to train.", only=("partial",), group="Adapters"
    )
    train_only: tuple[str, ...] = key(
        (), "words", "Regular expressions of the only ones to train.", only=("partial",), group="Adapters"
    )

    epochs: float = key(1.0, "float", "Passes over the data.", above=0, group="Training")
    max_steps: int | None = key(None, "int", "Optimiser steps, in place of epochs.", low=1, group="Training")
    batch_size: int = key(8, "int", "Sequences at once (on each device).", low=1, group="Training")
    gradient_accumulation: int = key(1, "int", "Batches of a step.", low=1, group="Training")
    gradient_checkpointing: bool = key(False, "bool", "Less memory, a third more time.", group="Training")
    learning_rate: float | None = key(
        None,
        "float",
        "Default: 2e-5 full and partial, 2e-4 LoRA, 1e-3 BitFit and bottlenecks, 3e-3 IA3, 1e-2 prompts.",
        above=0,
        high=10,
        group="Training",
    )
    scheduler: str = key("cosine", "str", "Of the learning rate.", choices=SCHEDULERS, group="Training")
    warmup: float = key(0.03, "float", "Steps; below 1 a share of all.", low=0, group="Training")
    optimizer: str = key(
        "adamw", "str", "8 bit ones need bitsandbytes and a GPU.", choices=OPTIMIZERS, group="Training"
    )
    weight_decay: float = key(0.0, "float", "Of AdamW, on all but norms and biases.", low=0, high=1, group="Training")
    max_grad_norm: float = key(1.0, "float", "Gradients are clipped to this norm; 0: not.", low=0, group="Training")
    precision: str = key(
        "auto",
        "str",
        "Mixed precision; auto: bf16 where a GPU has it.",
        choices=("auto", "fp32", "bf16", "fp16"),
        group="Training",
    )
    dtype: str = key(
        "auto",
        "str",
        "Of frozen and trained weights in memory; auto: float32, bfloat16 if frozen on a GPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
        group="Training",
    )
    rope_scaling: str | None = key(
        None, "str", "Extends the context, by rope_factor.", choices=("linear", "dynamic", "yarn"), group="Training"
    )
    rope_factor: float = key(2.0, "float", "The new context, of the old.", above=1, group="Training")
    attention: str = key(
        "sdpa",
        "str",
        "Implementation of attention.",
        choices=("sdpa", "eager", "flash_attention_2"),
        group="Training",
    )
    seed: int = key(0, "int", "Of order, mixing, masks and new weights.", low=0, high=2**32 - 1, group="Training")

    eval_every: int | None = key(
        None, "int", "Steps; default: once an epoch, or as save_every.", low=1, group="Watching"
    )
    save_every: int | None = key(None, "int", "Steps; default: as eval_every.", low=1, group="Watching")
    early_stopping: int | None = key(
        None, "int", "Stop after so many evaluations without a better loss.", low=1, group="Watching"
    )
    keep_best: bool | None = key(
        None,
        "bool",
        "Result: the checkpoint with the least validation loss; default: if there is one.",
        group="Watching",
    )
    log_every: int = key(10, "int", "Steps.", low=1, group="Watching")
    tensorboard: bool = key(
        False,
        "bool",
        "Write TensorBoard events to OUT/tensorboard (OUT.partial/tensorboard meanwhile).",
        group="Watching",
    )


KEYS: dict[str, Key] = {one.name: one.metadata["key"] for one in fields(Config)}
SOURCE_KEYS: dict[str, Key] = {
    "path": Key("str", "the file, or a hub id"),
    "subset": Key("str", "of a data set of the hub"),
    "split": Key("str", "of a data set of the hub; default: train"),
    "format": Key("str", "of this file", choices=FORMATS),
    "prompt": Key("str", "template"),
    "completion": Key("str", "template"),
    "text": Key("str", "template"),
    "ignore_columns": Key("words", "columns that are left out"),
    "weight": Key("float", "share of the mixture", above=0),
    "task": Key("str", "label of the task, for losses by task"),
}
