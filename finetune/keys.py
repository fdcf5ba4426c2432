"""The schema of `merge finetune`: every key with its type, range, default and one line of help.

This table reads the YAML file, makes the command line's flags and docs/finetune-keys.md, and states which keys belong
to which way of training. A new key is one line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from merge.schema.keys import Key

# The values of `train` in the order of `--help`; finetune/trainables.py implements them.
TRAIN = (*("full", "partial", "bitfit", "lora", "qlora", "ia3", "prompt", "prefix", "ptuning", "bottleneck"),)
FORMATS = (
    *("messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "kto", "anchor_positive"),
    "text_label",
)


def _objectives(*first: str) -> tuple[str, ...]:
    """The names of the files of finetune/objectives/, but for those that others share; `first` in that order."""
    found = {file.stem for file in (Path(__file__).parent / "objectives").glob("[a-z]*.py")} - {"base", "causal"}
    return (*first, *sorted(found.difference(first)))


# In the order that `--help` shows.
OBJECTIVES = _objectives(
    *("supervised", "text", "infilling", "mlm", "classification", "dpo", "kto", "distillation", "embeddings")
)
SCHEDULERS = (
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd")

_LORA = ("lora", "qlora")
_ADAPTERS = (*_LORA, "ia3", "bottleneck")
PROMPTS = ("prompt", "prefix", "ptuning")


@dataclass(frozen=True)
class ConfigKey(Key):
    """One key of a config. Its kind may also be `data` or `fraction|data`.

    `only` lists the ways of training that the key belongs to, `objectives` the objectives; () means all.
    """

    only: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    group: str = ""


def key(default: Any, kind: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"key": ConfigKey(kind, help, **more)})


@dataclass(frozen=True)
class DataSource:
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

    def read_like(self, other: DataSource | None) -> DataSource:
        """A source given only by its path takes the columns of the other one: validation data like training data."""
        if other is None or self != DataSource(self.path):
            return self
        return replace(other, path=self.path, weight=None, subset=None, split=None)


@dataclass(frozen=True)
class Config:
    """All settings that affect the result of a run."""

    model: str = key("", "str", "What to train: a directory or hub id (org/name@revision).")
    data: tuple[DataSource, ...] = key(
        (), "data", "A data file (.jsonl .json .csv .parquet .txt) or a hub id; may be repeated."
    )
    out: str = key("", "str", "Directory for the result.")
    train: str = key("lora", "str", "What is trained.", choices=TRAIN)
    objective: str | None = key(
        None, "str", "What is learnt; default: chosen by the format of the data.", choices=OBJECTIVES
    )
    adapter: str | None = key(None, "str", "An adapter to continue (merge finetune continue).")

    format: str | None = key(None, "str", "Format of the data; detected by default.", choices=FORMATS)
    prompt: str | None = key(None, "str", 'Template of the prompt, such as "Q: {question}\\nA: ".')
    completion: str | None = key(None, "str", 'Template of the completion, such as "{answer}".')
    text: str | None = key(None, "str", 'Template of a text, such as "{title}\\n{body}".')
    chat: bool | None = key(
        None,
        "bool",
        "Put prompts and completions into the chat template, as two turns; default: only conversations, and alpaca if "
        "the tokenizer has a template.",
    )
    ignore_columns: tuple[str, ...] = key((), "words", "Columns of the data to leave out.")
    chat_template: str | None = key(None, "str", "A Jinja file, or chatml; default: the tokenizer's.")
    validation: float | tuple[DataSource, ...] | None = key(
        None, "fraction|data", "Validation data: a share of the data such as 0.05, or a file."
    )
    prompt_loss_weight: float = key(
        0.1, "float", "Weight of prompt tokens in the loss; response tokens weigh 1.", low=0, high=1
    )
    last_turn_only: bool = key(False, "bool", "Only the last answer of a conversation weighs 1.")
    max_length: int | None = key(
        None, "int", "Tokens in a sequence, at most; default: the model's context, up to 2048.", low=2
    )
    too_long: str | None = key(
        None,
        "str",
        "What to do with longer examples; default: error, for text split.",
        choices=("error", "truncate", "drop", "split"),
    )
    packing: bool = key(False, "bool", "Put several examples into one sequence; they do not attend to each other.")
    new_tokens: tuple[str, ...] = key((), "words", "Tokens to add to the vocabulary.")
    eos_token: str | None = key(None, "str", "Token that ends an example; default: the tokenizer's.")
    pad_token: str | None = key(None, "str", "Padding token; default: the tokenizer's, or eos.")

    infilling_rate: float = key(
        0.5, "float", "Share of texts whose middle moves to the end.", low=0, high=1, objectives=("infilling",)
    )
    infilling_tokens: tuple[str, ...] = key(
        (), "words", "Tokens that mark prefix, suffix and middle; default: the tokenizer's.", objectives=("infilling",)
    )
    mask_rate: float = key(0.15, "float", "Share of tokens to predict.", above=0, high=0.9, objectives=("mlm",))
    mask_copies: int = key(1, "int", "Copies of each text, each masked differently.", low=1, objectives=("mlm",))
    whole_words: bool = key(False, "bool", "Mask all tokens of a word, or none.", objectives=("mlm",))
    labels: tuple[str, ...] = key(
        (), "words", "Names of the labels in order; default: as in the data.", objectives=("classification",)
    )
    class_weights: dict[str, float] | None = key(
        None, "table", "Weights of the losses, by label.", above=0, objectives=("classification",)
    )
    balance_classes: bool = key(False, "bool", "Weigh all labels equally.", objectives=("classification",))
    beta: float = key(
        0.1,
        "float",
        "How strongly DPO and KTO keep the model close to the reference.",
        above=0,
        objectives=("dpo", "kto"),
    )
    wanted_weight: float = key(1.0, "float", "Weight of the losses of wanted answers.", above=0, objectives=("kto",))
    unwanted_weight: float = key(
        1.0, "float", "Weight of the losses of unwanted answers.", above=0, objectives=("kto",)
    )
    label_smoothing: float = key(
        0.0, "float", "Share of preferences assumed to be wrong.", low=0, high=0.5, objectives=("dpo",)
    )
    teacher: str | None = key(None, "str", "The model to learn from.", objectives=("distillation",))
    temperature: float = key(2.0, "float", "Temperature of teacher and student.", above=0, objectives=("distillation",))
    distillation_alpha: float = key(
        0.5,
        "float",
        "Share of the teacher in the loss; the rest is the data's.",
        above=0,
        high=1,
        objectives=("distillation",),
    )
    similarity_temperature: float = key(
        0.05, "float", "Cosine similarities are divided by this.", above=0, objectives=("embeddings",)
    )

    rank: int = key(16, "int", "Rank of LoRA's matrices.", low=1, only=_LORA)
    alpha: float | None = key(
        None, "float", "LoRA's scale is alpha/rank; default: twice the rank.", above=0, only=_LORA
    )
    dropout: float = key(0.0, "float", "Dropout before LoRA's matrices.", low=0, high=0.99, only=_LORA)
    rslora: bool = key(False, "bool", "Use the scale alpha/sqrt(rank) (rsLoRA).", only=_LORA)
    dora: bool = key(False, "bool", "Train magnitude and direction (DoRA).", only=_LORA)
    rank_pattern: dict[str, float] | None = key(
        None, "table", "Ranks by regular expression on module names.", low=1, only=_LORA
    )
    alpha_pattern: dict[str, float] | None = key(
        None, "table", "Alphas by regular expression on module names.", above=0, only=_LORA
    )
    target_modules: tuple[str, ...] = key(
        (), "words", "Modules to adapt; default: all linear layers (LoRA), PEFT's choice (others).", only=_ADAPTERS
    )
    feedforward_modules: tuple[str, ...] = key(
        (), "words", "Modules among target_modules whose input IA3 scales.", only=("ia3",)
    )
    modules_to_save: tuple[str, ...] = key(
        (), "words", "Modules to train and save whole, such as embed_tokens.", only=(*_LORA, "ia3")
    )
    double_quantization: bool = key(True, "bool", "Quantise the scales of the weights too.", only=("qlora",))
    virtual_tokens: int = key(20, "int", "Length of the learnt prompt or prefix.", low=1, only=PROMPTS)
    prompt_init: str | None = key(None, "str", "Text that the prompt is initialised from.", only=("prompt",))
    encoder_hidden: int | None = key(None, "int", "Width of the prompt encoder.", low=1, only=("prefix", "ptuning"))
    bottleneck: int = key(16, "int", "Width of a bottleneck adapter.", low=1, only=("bottleneck",))
    freeze_first: int | None = key(None, "int", "Freeze embeddings and this many layers.", low=1, only=("partial",))
    train_last: int | None = key(
        None, "int", "Train this many last layers, final norm and head.", low=1, only=("partial",)
    )
    freeze: tuple[str, ...] = key((), "words", "Regular expressions of parameters not to train.", only=("partial",))
    train_only: tuple[str, ...] = key(
        (), "words", "Regular expressions of the only parameters to train.", only=("partial",)
    )

    epochs: float = key(1.0, "float", "Passes over the data.", above=0)
    max_steps: int | None = key(None, "int", "Optimiser steps, in place of epochs.", low=1)
    batch_size: int = key(8, "int", "Sequences in a batch, on each device.", low=1)
    gradient_accumulation: int = key(1, "int", "Batches in an optimiser step.", low=1)
    gradient_checkpointing: bool = key(False, "bool", "Save memory for about a third more time.")
    learning_rate: float | None = key(
        None,
        "float",
        "Default: 2e-5 full and partial, 2e-4 LoRA, 1e-3 BitFit and bottlenecks, 3e-3 IA3, 1e-2 prompts.",
        above=0,
        high=10,
    )
    scheduler: str = key("cosine", "str", "Schedule of the learning rate.", choices=SCHEDULERS)
    warmup: float = key(0.03, "float", "Warm-up steps; below 1: a share of all steps.", low=0)
    optimizer: str = key("adamw", "str", "The 8-bit optimisers need bitsandbytes and a GPU.", choices=OPTIMIZERS)
    weight_decay: float = key(0.0, "float", "AdamW's weight decay, on all but norms and biases.", low=0, high=1)
    max_grad_norm: float = key(1.0, "float", "Clip gradients to this norm; 0: no clipping.", low=0)
    precision: str = key(
        "auto", "str", "Mixed precision; auto: bf16 on GPUs that support it.", choices=("auto", "fp32", "bf16", "fp16")
    )
    dtype: str = key(
        "auto",
        "str",
        "Dtype of the weights in memory; auto: float32, and bfloat16 for frozen weights on a GPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    rope_scaling: str | None = key(
        None, "str", "Extend the context by rope_factor.", choices=("linear", "dynamic", "yarn")
    )
    rope_factor: float = key(2.0, "float", "The new context divided by the old one.", above=1)
    attention: str = key("sdpa", "str", "Implementation of attention.", choices=("sdpa", "eager", "flash_attention_2"))
    seed: int = key(0, "int", "Seed of order, mixing, masks and new weights.", low=0, high=2**32 - 1)

    eval_every: int | None = key(
        None, "int", "Steps between evaluations; default: save_every, else once an epoch.", low=1
    )
    save_every: int | None = key(None, "int", "Steps between checkpoints; default: eval_every.", low=1)
    early_stopping: int | None = key(None, "int", "Stop after this many evaluations without a better loss.", low=1)
    keep_best: bool | None = key(
        None, "bool", "The result is the checkpoint with the lowest validation loss; default: true with validation."
    )
    log_every: int = key(10, "int", "Steps between lines of the log.", low=1)
    tensorboard: bool = key(
        False, "bool", "Write TensorBoard events to OUT/tensorboard (during training: OUT.partial/tensorboard)."
    )


# The first key of a group -> its heading in `--help` and the documents.
_GROUPS = {
    "model": "What",
    "format": "Data",
    "infilling_rate": "Objectives",
    "rank": "Adapters",
    "epochs": "Training",
    "eval_every": "Watching",
}


def _grouped() -> Iterator[tuple[str, ConfigKey]]:
    group = ""
    for one in fields(Config):
        group = _GROUPS.get(one.name, group)
        yield one.name, replace(one.metadata["key"], group=group)


KEYS: dict[str, ConfigKey] = dict(_grouped())
SOURCE_KEYS: dict[str, ConfigKey] = {
    "path": ConfigKey("str", "The file, or a hub id."),
    "subset": ConfigKey("str", "Subset of a data set on the hub."),
    "split": ConfigKey("str", "Split of a data set on the hub; default: train."),
    "format": ConfigKey("str", "Format of this file.", choices=FORMATS),
    "prompt": ConfigKey("str", "Template of the prompt."),
    "completion": ConfigKey("str", "Template of the completion."),
    "text": ConfigKey("str", "Template of a text."),
    "ignore_columns": ConfigKey("words", "Columns to leave out."),
    "weight": ConfigKey("float", "Relative share in the mixture.", above=0),
    "task": ConfigKey("str", "Name of the task, for losses by task."),
}
