"""Class and labels in config.json that fit the result's head.

A head follows its tensors. The donor of config.json may be a plain encoder, or may have another number of labels than
the head that was merged; then class and labels are those of an input that has the merged head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.planned import Planned

# Matrices with a row for each label, in transformers' classes.
_LABEL_HEADS = (
    *("classifier", "score", "classifier.out_proj", "classification_head.out_proj", "qa_outputs", "logits_proj"),
    *("cls_classifier", "distillation_classifier", "classifier.3", "label_classifier"),
)
_LABEL_ENDS = tuple(f".{head}" for head in _LABEL_HEADS)
_NUMBERED = re.compile(r"(?:^|\.)\d+(?:\.|\Z)")
_LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")
_DEFAULT_LABELS = 2  # of transformers' configs


@dataclass(frozen=True)
class Parent:
    """The facts of an input that decide: its config, and the names of its tensors."""

    config: Mapping[str, Any]
    names: Mapping[str, object]


def with_head(
    donor: Mapping[str, Any], parents: Sequence[Parent], shapes: Mapping[str, tuple[int, ...]]
) -> Planned[dict[str, Any]]:
    """The donor's config with the class and the labels of the output's head.

    Args:
        parents: all inputs, the donor first.
        shapes: of the output's tensors.
    """
    config, notes = dict(donor), []
    heads = [name for name in shapes if _outside_layers(name)]
    if any(name not in parents[0].names for name in heads):
        whole = next((p for p in parents if p.config.get("architectures") and all(n in p.names for n in heads)), None)
        if whole is not None and whole.config["architectures"] != config.get("architectures"):
            config["architectures"] = whole.config["architectures"]
            notes.append(f"architectures: {', '.join(map(str, config['architectures']))}, which has all of the tensors")
    rows = next((shapes[name][0] for name in shapes if _is_label_head(name) and shapes[name]), None)
    if rows is None or rows == _n_labels(config) or _scores_choices(config):
        return Planned(config, notes=tuple(notes))
    named = next((p.config for p in parents if _n_labels(p.config) == rows and any(map(_is_label_head, p.names))), None)
    for key in _LABEL_KEYS:
        config.pop(key, None)
        if named is not None and key in named:
            config[key] = named[key]
    if named is None or _n_labels(config) != rows:
        labels = [f"LABEL_{i}" for i in range(rows)]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    notes.append(f"labels: {rows}, as many as the head has rows")
    return Planned(config, notes=tuple(notes))


def _outside_layers(name: str) -> bool:
    return _NUMBERED.search(name) is None


def _is_label_head(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module != name and f".{module}".endswith(_LABEL_ENDS)


def _scores_choices(config: Mapping[str, Any]) -> bool:
    """Whether the head gives one number for each choice, whatever the labels."""
    return any(str(name).endswith("ForMultipleChoice") for name in config.get("architectures") or ())


def _n_labels(config: Mapping[str, object]) -> int:
    labels = config.get("id2label")
    if isinstance(labels, Mapping):
        return len(labels)
    number = config.get("num_labels")
    return number if isinstance(number, int) else _DEFAULT_LABELS
