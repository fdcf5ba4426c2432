"""Sequence classification: predicts one label for a text, by a head on the model.

Labels are detected in the training data (numbers in numerical order, else by alphabet), or named in order by `labels`;
a base that is a classifier for all of them keeps its own order, and so its head. Names go to the model's id2label.
Class weights multiply the losses of a class, and the mean is over these weights, as in torch's cross entropy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from finetune.data.contents import Labelled, Sample
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, BatchRow
from finetune.keys import Config
from finetune.objectives.base import Objective, Run, inputs_of, model_inputs
from merge.errors import UsageError
from merge.schema.names import suggest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

_MOST = 1000  # more labels suggest another kind of column


class Classification(Objective):
    takes = (Labelled,)
    too_long = "error"
    model_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    pipeline = "text-classification"
    unit = "an example"
    by_token = False

    def __init__(self, labels: tuple[str, ...] = (), weights: tuple[float, ...] = (), pad: int | None = None) -> None:
        self._labels, self._weights, self._pad = labels, weights, pad

    def bind(self, run: Run) -> Self:
        counts = Counter(_label(sample) for sample in run.train)
        labels = run.config.labels or _own_labels(run.base.config, counts) or detect_labels(counts)
        if not 2 <= len(set(labels)) <= _MOST:
            raise UsageError(
                f"labels: {len(set(labels)):,} found ({', '.join(labels[:5])}); classification needs at least 2 and at "
                f"most {_MOST:,}. Is that the right column?"
            )
        for sample in (*run.train, *run.validation):
            number_of(sample, labels, "labels" if run.config.labels else "the training data")
        amounts = [0.0] * len(labels)
        for label, count in counts.items():
            amounts[_place(label, labels)] += count
        return type(self)(labels, _class_weights(run.config, labels, amounts), run.tokenizer.pad_token_id)

    def loading(self) -> dict[str, object]:
        return {
            "id2label": dict(enumerate(self._labels)),
            "label2id": {label: i for i, label in enumerate(self._labels)},
            "pad_token_id": self._pad,  # generative models use the last token that is not padding
        }

    def record(self) -> dict[str, object]:
        return {"labels": list(self._labels)}

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        assert isinstance(sample.content, Labelled)
        ids = encoder.marked(sample.content.text, encoder.config.too_long or self.too_long)
        if ids is None:
            return []
        if not len(ids):
            raise UsageError(f"data {sample.place}: the text is empty, so there is nothing to classify. Remove it.")
        label = number_of(sample, self._labels, "labels")
        return [Example(ids, np.zeros(len(ids), np.float32), sample.place, sample.task, label=label)]

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        """input_ids, attention_mask (row, token) int64; labels (row,) int64; weights (row,) float32."""
        import torch

        numbers, examples = zip(*(item for row in rows for item in row.examples), strict=True)
        labels = torch.tensor([example.label for example in examples])
        weights = torch.tensor(self._weights)[labels]
        ids = inputs_of([example.ids for example in examples], pad)
        return {**ids, "targets": labels, "weights": weights, "examples": list(numbers)}

    def weights(self, batch: Batch) -> Tensor:
        return batch["weights"]

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        logits = model(**model_inputs(batch)).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none") * batch["weights"]
        return losses, logits.argmax(-1, keepdim=True).float()

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        found = columns[:, 0].numpy().astype(np.int64)
        true = np.array([example.label for example in examples])
        return classification_metrics(true, found, len(self._labels))


def classification_metrics(true: NDArray[np.int64], found: NDArray[np.int64], n_labels: int) -> dict[str, float]:
    """true, found (example,) int -> accuracy, macro F1 and Matthews' correlation.

    Macro F1 is the mean over labels that occur in either; Matthews' coefficient is that of Gorodkin 2004 for any number
    of classes, 0 where one side is constant.
    """
    table = np.zeros((n_labels, n_labels), np.int64)
    np.add.at(table, (true, found), 1)
    hits, wanted, given = np.diag(table), table.sum(1), table.sum(0)
    seen = (wanted + given) > 0
    f1 = 2 * hits[seen] / (wanted + given)[seen]
    total = table.sum()
    spread = (total**2 - (wanted.astype(float) ** 2).sum()) * (total**2 - (given.astype(float) ** 2).sum())
    covariance = hits.sum() * total - float(wanted @ given)
    return {
        "accuracy": float(hits.sum() / total),
        "macro_f1": float(f1.mean()),
        "matthews": float(covariance / np.sqrt(spread)) if spread > 0 else 0.0,
    }


def detect_labels(counts: Counter[str]) -> tuple[str, ...]:
    """Numbers in their order, other labels by alphabet."""
    if all(_is_number(label) for label in counts):
        return tuple(sorted(counts, key=int))
    return tuple(sorted(counts))


def number_of(sample: Sample, labels: Sequence[str], source: str) -> int:
    """The class of a sample. Raises UsageError for a label that is unknown or out of range."""
    label = _label(sample)
    try:
        return _place(label, labels)
    except ValueError:
        known = ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")
        if _is_number(label):
            why = f"label {label} is out of range: {source} has {len(labels)}, {known}"
        else:
            why = f'label "{label}" is not in {source} ({known}); {suggest(label, list(labels))}'
        raise UsageError(f"data {sample.place}: {why}. Correct it, or list all labels: labels.") from None


def _place(label: str, labels: Sequence[str]) -> int:
    """A label by its name; or by its number, where the names are not numbers. Raises ValueError."""
    if label in labels:
        return list(labels).index(label)
    if _is_number(label) and not any(map(_is_number, labels)) and 0 <= int(label) < len(labels):
        return int(label)
    raise ValueError(label)


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _label(sample: Sample) -> str:
    assert isinstance(sample.content, Labelled)
    return sample.content.label


def _own_labels(config: PreTrainedConfig, counts: Counter[str]) -> tuple[str, ...]:
    """The labels of a base that is a classifier for all labels of the data."""
    if not any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or ()):
        return ()
    own = tuple(str(config.id2label[i]) for i in sorted(config.id2label))
    return own if set(counts) <= set(own) else ()


def _class_weights(config: Config, labels: tuple[str, ...], amounts: list[float]) -> tuple[float, ...]:
    """(label,): weights of the config, or n / (classes * count), which gives every class the same sum."""
    if config.balance_classes and config.class_weights:
        raise UsageError("balance_classes and class_weights both weight the classes; keep one.")
    if config.balance_classes:
        empty = [label for label, amount in zip(labels, amounts, strict=True) if not amount]
        if empty:
            raise UsageError(f'balance_classes: the training data has no example of label "{empty[0]}".')
        return tuple(sum(amounts) / (len(labels) * amount) for amount in amounts)
    given = config.class_weights or {}
    for label in given:
        if label not in labels:
            raise UsageError(f'class_weights: "{label}" is not a label; {suggest(label, list(labels))}')
    return tuple(float(given.get(label, 1.0)) for label in labels)


OBJECTIVE = Classification()
