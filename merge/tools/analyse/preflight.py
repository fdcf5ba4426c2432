"""What the files say before any weight is read: what decides whether and how models merge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge.architecture import class_of, layer_counts
from merge.errors import CheckpointError
from merge.planning.inputs import Input
from merge.quoting import excerpt, some
from merge.tools.analyse.results import AnalysisFinding
from merge.vocabulary.report import compare
from merge.vocabulary.tokenizer import Tokenizer, has_tokenizer, read_tokenizer

_THETA = 10_000.0  # where a config says nothing
_OF_ARCHITECTURE = (
    *("model_type", "hidden_act", "activation_function", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("sliding_window", "rms_norm_eps", "layer_norm_eps", "attention_bias", "mlp_bias", "logit_scale"),
)


def preflight(inputs: Sequence[Input]) -> Iterator[AnalysisFinding]:
    """Findings about each model against the base, which is the first input.

    A tokenizer that cannot be read is a finding too.
    """
    base = inputs[0]
    tokenizers: dict[str, Tokenizer] = {}
    for model in inputs:
        try:
            if has_tokenizer(model.checkpoint.tokenizer_path):
                tokenizers[model.ref.text] = read_tokenizer(model.checkpoint.tokenizer_path, model.ref.text)
        except CheckpointError as error:
            yield AnalysisFinding("problem", "tokenizer", (model.ref.text,), str(error))
    for model in inputs[1:]:
        yield from _architecture(base, model)
        if base.ref.text in tokenizers and model.ref.text in tokenizers:
            yield from _tokenizers(tokenizers[base.ref.text], tokenizers[model.ref.text], model)
        elif len(tokenizers) > 0:
            yield _finding(
                "note", "tokenizer", model, "cannot be compared, as only some of the models have a tokenizer"
            )
    yield from _dtypes(inputs)


def _architecture(base: Input, model: Input) -> Iterator[AnalysisFinding]:
    ours, theirs = (class_of(each.config) for each in (base, model))
    if ours != theirs:
        yield _finding("problem", "architecture", model, f"is {theirs}, the base {ours}")
    if sorted(layer_counts(base.config)) != sorted(layer_counts(model.config)):
        text = f"counts {layer_counts(model.config)} layers, the base {layer_counts(base.config)}"
        yield _finding("problem", "architecture", model, text)
    if (rope := _rope(base)) != (found := _rope(model)):
        yield _finding("problem", "rope", model, f"positions are {_said(found)}, the base's {_said(rope)}")
    for what, keys in (("ties", ("tie_word_embeddings",)), ("architecture", _OF_ARCHITECTURE)):
        for key, mine, other in _differences(base, model, keys):
            yield _finding("warning", what, model, f"{key} is {_said(other)}, the base's {_said(mine)}")
    for text in _lacking(base, model):
        yield _finding("warning", "tensors", model, text)


def _differences(base: Input, model: Input, keys: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Of keys that both configs have: what one of them leaves out is its class's default."""
    ours, theirs = _text(base), _text(model)
    for key in keys:
        mine, other = ours.get(key), theirs.get(key)
        if mine != other and mine is not None and other is not None:
            yield key, mine, other


def _rope(model: Input) -> dict[str, Any]:
    """Rotary positions, however the version of transformers that wrote the config calls them."""
    config = _text(model)
    parts = [part for key in ("rope_scaling", "rope_parameters") if isinstance(part := config.get(key), Mapping)]
    found = {key: value for part in parts for key, value in part.items()}
    kind = found.pop("type", None)
    theta = found.pop("rope_theta", config.get("rope_theta"))
    return found | {
        "rope_theta": _THETA if theta is None else theta,
        "rope_type": found.get("rope_type") or kind or "default",
    }


def _text(model: Input) -> Mapping[str, Any]:
    return model.config.get("text_config") or model.config


def _lacking(base: Input, model: Input) -> Iterator[str]:
    lacks = [name for name in base.tensors if name not in model.tensors]
    more = [name for name in model.tensors if name not in base.tensors]
    shapes = [n for n, ref in model.tensors.items() if n in base.tensors and base.tensors[n].shape != ref.shape]
    if lacks:
        yield f"lacks {some(lacks)} of the base"
    if more:
        yield f"has {some(more)}, which the base lacks"
    if shapes:
        name = shapes[0]
        found, expected = list(model.tensors[name].shape), list(base.tensors[name].shape)
        yield f"{some(shapes)}: other shapes than the base's ({found} for {expected})"


def _tokenizers(ours: Tokenizer, theirs: Tokenizer, model: Input) -> Iterator[AnalysisFinding]:
    found = compare(ours, theirs)
    if not found["same_ids"]:
        text = (
            f"has {len(_only(ours, theirs)):,} tokens that the base lacks, lacks {len(_only(theirs, ours)):,} of its, "
            f"and has {found['moved']:,} under other numbers"
        )
        yield _finding("problem" if found["moved"] else "warning", "vocabulary", model, text)
    if found["merges_only_first"] or found["merges_only_other"]:
        text = f"merges: {found['merges_only_other']:,} that the base lacks, {found['merges_only_first']:,} of the base"
        yield _finding("warning", "tokenizer", model, text)
    if found["differ"]:
        yield _finding("warning", "tokenizer", model, f"another {' and '.join(found['differ'])} than the base's")
    for role, (mine, other) in found["special"].items():
        yield _finding("warning", "tokenizer", model, f"{role} is {_said(other)}, the base's {_said(mine)}")
    if not found["same_chat_template"]:
        which = "no chat template" if theirs.template is None else "a chat template"
        than = ", the base has none" if ours.template is None else ", the base has another"
        level = "note" if ours.template is None else "warning"
        yield _finding(level, "chat template", model, f"{which}{than if theirs.template else ', the base has one'}")


def _only(first: Tokenizer, other: Tokenizer) -> list[str]:
    """The tokens of `other` that `first` lacks"""
    return [token for token in other.vocabulary if token not in first.vocabulary]


def _dtypes(inputs: Sequence[Input]) -> Iterator[AnalysisFinding]:
    """The dtypes of each model's tensors, where not all models have the same."""
    counts = [Counter(ref.dtype for ref in model.tensors.values()) for model in inputs]
    for model, count in zip(inputs[1:], counts[1:], strict=True):
        if list(count) != list(counts[0]):
            yield _finding("note", "dtype", model, f"is {_listed(count)}, the base {_listed(counts[0])}")


def _listed(counts: Mapping[str, int]) -> str:
    return " and ".join(sorted(counts))


def _said(value: object) -> str:
    return "not set" if value is None else excerpt(json.dumps(value, ensure_ascii=False))


def _finding(level: Any, what: str, model: Input, text: str) -> AnalysisFinding:
    return AnalysisFinding(level, what, (model.ref.text,), f"{model.ref.text}: {text}")
