"""`model+adapter`: a Checkpoint whose tensors have the adapter folded in while they are read.

What PEFT's merge_and_unload makes of the model, including tied heads: a change of the embedding or of the head is one
of both, and a model with only one of the two replaced is tied no more.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge.architecture import is_embedding, is_head, says_tied
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.adapter import Adapter, LoraModule, open_adapter
from merge.derive.lora import fold
from merge.derive.recast import recast
from merge.derive.token_rows import replace_rows
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import some
from merge.recipe.model import ModelRef

# Models of transformers whose linear layers are Conv1D, stored (in, out), and the names of those.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_HEAD = "lm_head.weight"
_FLOATS = {"F32", "BF16", "F16"}
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


def open_model(ref: ModelRef, known: Mapping[str, Checkpoint] | None = None) -> Checkpoint:
    """A model with its adapter, if it has one, from headers and configs only.

    Args:
        known: models that are not on the disk, by path: the stages of a pipeline.

    Raises:
        CheckpointError: either cannot be opened, or the adapter does not fit the model.
    """
    plain = dataclasses.replace(ref, adapter=None)
    checkpoint = known[ref.path] if known and ref.path in known else open_checkpoint(plain)
    if ref.adapter is None:
        return checkpoint
    adapter = open_adapter(ref.adapter)
    return fold_adapter(dataclasses.replace(checkpoint, ref=ref), adapter)


def fold_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with every tensor of the adapter in its place."""
    tensors, config, notes = _Fold(checkpoint, adapter).tensors()
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors=tensors,
        files=(*checkpoint.files, *adapter.files),
        notes=(*checkpoint.notes, *adapter.notes, *notes),
    )


class _Fold:
    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.result = dict(checkpoint.tensors)
        self.config: dict[str, Any] = checkpoint.config
        self.notes: list[str] = []
        embedding = next((name for name in self.result if is_embedding(name)), None)
        head = next((name for name in self.result if is_head(name)), None)
        said = says_tied(self.config)
        self.tied = embedding is not None and (bool(said) or (head is None and said is None))
        self.embedding, self.head = embedding, head

    def tensors(self) -> tuple[dict[str, TensorRef], dict[str, Any], list[str]]:
        adapter = self.adapter
        changes = [f"{module}.weight" for module in adapter.modules]
        place = self._places([*changes, *adapter.saved, *adapter.tokens])
        self._check_collisions(place, changes)
        for name, ref in adapter.saved.items():
            self._replace(name, place[name], ref)
        for name, module in zip(changes, adapter.modules.values(), strict=True):
            self._change(place[name], module)
        for name, rows in adapter.tokens.items():
            self._rows(place[name], rows.rows, rows.indices)
        self._mention_base()
        return self.result, self.config, self.notes

    def _places(self, wanted: list[str]) -> dict[str, str]:
        """The adapter's tensor names -> those of the model, which may differ by a prefix."""
        names = self.checkpoint.tensors
        place = {name: name for name in wanted if name in names}
        for name in wanted:  # a tied head need not be stored
            if self.tied and self.embedding is not None and is_head(name) and name not in names:
                place[name] = name if self._is_apart(name) else self.embedding
        rest = [name for name in wanted if name not in place]
        change = find_prefix(rest, names) if rest else None
        if rest and change is None:
            raise CheckpointError(
                f"{self.adapter.path}: {some(rest)}: not in {self.checkpoint.path}, which has for example "
                f"{next(iter(names), 'no tensors')}.{self._trained_on()} Name the base model that the adapter was "
                "trained on."
            )
        if change is not None:
            removed, added = change
            place |= {name: added + name.removeprefix(removed) for name in rest}
            self.notes.append(
                f'{self.adapter.path}: its names start with "{removed}" where those of the model start with "{added}"'
            )
        return place

    def _trained_on(self) -> str:
        return f" The adapter was trained on {self.adapter.base_name}." if self.adapter.base_name else ""

    def _check_collisions(self, place: Mapping[str, str], changes: Sequence[str]) -> None:
        """A tensor is replaced once and changed once, apart from a tied pair, whose changes add up."""
        adapter = self.adapter
        both = set(adapter.tokens) & {*changes, *adapter.saved}
        if both:
            raise CheckpointError(
                f"{adapter.path}: {some(sorted(both))}: both trained tokens and another change of one tensor, which "
                "cannot be folded here. Fold it with PEFT's merge_and_unload."
            )
        shared = {self.embedding, self.head} if self.tied else set()
        for names in (changes, list(adapter.saved), list(adapter.tokens)):
            counts = Counter(place[name] for name in names if place[name] not in shared)
            twice = [name for name, count in counts.items() if count > 1]
            if twice:
                raise CheckpointError(
                    f"{adapter.path}: changes {some(twice)} twice, under different names. Save the adapter again."
                )

    def _is_apart(self, name: str) -> bool:
        """Whether a saved tensor is a module's own (modules_to_save): only then its tied twin does not follow it."""
        listed = self.adapter.config.get("modules_to_save") or ()
        module = name.rpartition(".")[0]
        return (
            name in self.adapter.saved
            and not self.adapter.config.get("ensure_weight_tying")
            and any(f".{module}".endswith(f".{key}") for key in listed)
        )

    def _replace(self, name: str, place: str, ref: TensorRef) -> None:
        """A tensor of the model gives way to one of the adapter."""
        known = self.checkpoint.tensors
        old = known[place] if place in known else known[self.embedding or place]  # the head of a tied model
        if ref.shape != old.shape:
            raise CheckpointError(f"{ref.file}: {ref.name}: {self._why_not(place, ref, old)}.")
        dtype = "BF16" if old.scale is not None else old.dtype
        if ref.dtype != dtype and not {ref.dtype, dtype} <= _FLOATS:
            raise CheckpointError(f"{ref.file}: {ref.name}: is {ref.dtype}, and takes the place of {dtype}.")
        if self.tied and (is_embedding(place) or is_head(place)):
            if self._is_apart(name):
                self._untie(place)
            else:
                self._follow(place, recast(ref, dtype))
        self.result[place] = recast(ref, dtype)

    def _why_not(self, place: str, ref: TensorRef, old: TensorRef) -> str:
        if ref.shape[1:] == old.shape[1:] and (is_embedding(place) or is_head(place)):
            return (
                f"the adapter's vocabulary has {ref.shape[0]:,} rows and the model's {old.shape[0]:,}. Fold it with "
                "PEFT, into the model with its embeddings resized"
            )
        return (
            f"expected shape {list(old.shape)}, found {list(ref.shape)}.{self._trained_on()} "
            "Name the base model that the adapter was trained on"
        )

    def _untie(self, place: str) -> None:
        """The embedding or the head is replaced alone: the other one keeps the numbers that both had."""
        assert self.embedding is not None
        head = self.head or (place if is_head(place) else _HEAD)
        self.result[head] = self.result[self.embedding]
        self.tied = False
        self.config = self.config | {"tie_word_embeddings": False}
        text = self.config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:
            self.config["text_config"] = text | {"tie_word_embeddings": False}
        self.notes.append(
            f"{self.adapter.path}: replaces {place} alone; {self.embedding} and {head} were tied and are so no more"
        )

    def _change(self, place: str, module: LoraModule) -> None:
        weight = self._float(place, module.a.file)
        rank, n_in, n_out = module.rank, module.a.shape[1], module.b.shape[0]
        plain, turned = (n_out, n_in), (n_in, n_out)
        transposed = weight.shape == turned and (
            module.embedding or weight.shape != plain or self._is_conv1d(place, module)
        )
        if weight.shape != (turned if transposed or module.embedding else plain):
            reason = "a convolution's adapter cannot be folded here" if len(weight.shape) > 2 else "they do not fit"
            raise CheckpointError(
                f"{module.a.file}: {module.name}: lora_A ({rank}, {n_in}) and lora_B ({n_out}, {rank}) change a matrix "
                f"of {n_out:,} outputs and {n_in:,} inputs; {place} of {self.checkpoint.path} has shape "
                f"{list(weight.shape)}: {reason}.{self._trained_on()} Name the base model that it was trained on."
            )
        for factor in (module.a, module.b, module.magnitude):
            if factor is not None and factor.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{factor.file}: {factor.name}: is {factor.dtype}; expected F32, BF16 or F16. Save it in float32."
                )
        self._set(place, fold(weight, module.a, module.b, module.scaling, transposed, module.magnitude))

    def _rows(self, place: str, rows: TensorRef, indices: tuple[int, ...]) -> None:
        weight = self._float(place, rows.file)
        last = max(indices, default=0)
        if len(weight.shape) == 2 and last >= weight.shape[0]:
            raise CheckpointError(
                f"{rows.file}: {rows.name}: has rows for tokens up to {last:,}, and {place} of {self.checkpoint.path} "
                f"ends with {weight.shape[0] - 1:,}. Fold it with PEFT, into the model with its embeddings resized."
            )
        if len(weight.shape) != 2 or rows.shape[1] != weight.shape[1]:
            raise CheckpointError(
                f"{rows.file}: {rows.name}: rows {list(rows.shape)} do not fit "
                f"{place} of {self.checkpoint.path}, which has shape {list(weight.shape)}.{self._trained_on()}"
            )
        self._set(place, replace_rows(weight, rows, indices))

    def _float(self, place: str, file: str) -> TensorRef:
        weight = self.result[place]
        if not DTYPES[weight.dtype].is_float or weight.dtype == "F64":
            raise CheckpointError(
                f"{self.checkpoint.path}: {place} is {weight.dtype}, and {file} changes it, which is done in float32. "
                "Convert the model to float32 or bfloat16."
            )
        return weight

    def _set(self, place: str, ref: TensorRef) -> None:
        self.result[place] = ref
        if self.tied and (is_head(place) or is_embedding(place)):
            self._follow(place, ref)
            note = f"{self.adapter.path}: changes {self.embedding}, which is the model's head too; both change"
            if note not in self.notes:
                self.notes.append(note)

    def _follow(self, place: str, ref: TensorRef) -> None:
        """Of a tied pair that is stored twice the other one changes with it."""
        other = self.embedding if is_head(place) else self.head
        if other is not None:
            self.result[other] = ref

    def _is_conv1d(self, place: str, module: LoraModule) -> bool:
        """Whether a square matrix is stored (in, out), which its shape does not say."""
        if self.config.get("model_type") in _CONV1D_MODELS:
            return place.split(".")[-2] in _CONV1D_NAMES
        return module.fan_in_fan_out

    def _mention_base(self) -> None:
        name = self.adapter.base_name
        base = self.checkpoint.ref
        known = {base.path, os.path.basename(self.checkpoint.path), base.text, base.path.rpartition("/")[2]}
        if name is not None and name not in known and name.rstrip("/").rpartition("/")[2] not in known:
            self.notes.append(f"{self.adapter.path}: was trained on {name}, and is folded into {base.path}")
        if self.adapter.revision is not None:
            self.notes.append(f"{self.adapter.ref.text}: adapter of commit {self.adapter.revision}")


def find_prefix(wanted: list[str], names: Mapping[str, object]) -> tuple[str, str] | None:
    """(prefix to remove, prefix to put before) that makes every wanted name one of `names`; None if not exactly one.

    transformers renames towers of several models between disk and memory, e.g. language_model.model.layers ->
    model.language_model.layers, and hub checkpoints of GPT-2 have no "transformer." in front.
    """
    parts = wanted[0].split(".")
    for depth in range(min(4, len(parts))):
        removed = "".join(f"{part}." for part in parts[:depth])
        rest = wanted[0].removeprefix(removed)
        fits = []
        for name in names:
            added = name.removesuffix(rest)
            if name.endswith(rest) and (not added or added.endswith(".")):
                changed = [added + each.removeprefix(removed) for each in wanted]
                if len(set(changed)) == len(wanted) and all(each in names for each in changed):
                    fits.append(added)
        if fits:
            return (removed, fits[0]) if len(fits) == 1 else None
    return None
