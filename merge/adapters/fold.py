"""`model+adapter`: a Checkpoint whose tensors have the adapter folded in while they are read.

What PEFT's merge_and_unload makes of the model, including tied heads: a change of the embedding or of the head is one
of both, and a model with only one of the two replaced is tied no more.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from merge.adapters.changes import Tensors, change_lora, change_other, change_parameter, replace
from merge.adapters.config import is_dequantized, trained_on
from merge.adapters.files import Adapter, open_adapter
from merge.adapters.parts import LoraModule, OtherModule, TokenRows
from merge.adapters.places import Place, Places, tied_groups
from merge.architecture import is_embedding, is_head
from merge.architecture.loaded import whole_piece
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import TensorRef
from merge.quoting import some
from merge.recipe.model import ModelRef
from merge.sources.added import added
from merge.sources.recast import recast
from merge.sources.token_rows import replace_rows
from merge.vocabulary.tokenizer import has_tokenizer

# Models of transformers whose linear layers are Conv1D, stored (in, out), and the names of those.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_FLOATS = {"F32", "BF16", "F16"}


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
    """The checkpoint with every tensor of the adapter applied."""
    fold = _Fold(checkpoint, adapter)
    tensors, config, notes = fold.tensors()
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors=tensors,
        files=(*checkpoint.files, *adapter.files),
        notes=(*checkpoint.notes, *adapter.notes, *notes),
        adapter_path=adapter.path,
        own_tokenizer=adapter.path if fold.is_resized and has_tokenizer(adapter.path) else None,
    )


class _Fold:
    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.result = Tensors(checkpoint.tensors)
        self.places = Places(checkpoint, adapter)
        self.config: dict[str, Any] = checkpoint.config
        self.notes: list[str] = []
        self.is_resized = False  # the vocabulary
        self.groups: tuple[tuple[str, ...], ...] = ()

    def tensors(self) -> tuple[dict[str, TensorRef], dict[str, object], list[str]]:
        adapter = self.adapter
        modules: dict[str, LoraModule | OtherModule] = {**adapter.modules, **adapter.others}
        changed = {f"{name}.weight": module for name, module in modules.items()}
        biases = {f"{name}.bias": module for name, module in adapter.modules.items() if module.bias is not None}
        wanted = [*changed, *biases, *adapter.saved, *adapter.tokens]
        self.groups = tied_groups(self.places, wanted)
        place = self._find(wanted)
        stacked = [(self.places.parameter(each.module, each.depth), each) for each in adapter.parameters.values()]
        self._check_floats()
        self._check_collisions(place, list(changed), [where for where, _ in stacked])
        for name, ref in adapter.saved.items():
            self._replace(name, place[name], ref)
        for name, module in changed.items():
            where = self._as_is(place[name])
            with self._changing(where, module.name):
                if isinstance(module, LoraModule):
                    inputs_first = self._is_inputs_first(where, module.fan_in_fan_out)
                    change_lora(self.result, where, module, adapter, inputs_first)
                else:
                    inputs_first = self._is_inputs_first(where, bool(adapter.config.get("fan_in_fan_out")))
                    change_other(self.result, where, self._bias(where), module, adapter, inputs_first)
        for where, factors in stacked:
            with self._changing(where, factors.module):
                change_parameter(self.result, where, factors, adapter)
        for name, module in biases.items():
            assert module.bias is not None
            with self._changing(place[name], module.name):
                stored = place[name].stored
                self.result[stored] = added(self.result[stored], module.bias, module.scaling)
        for name, rows in adapter.tokens.items():
            with self._changing(place[name], name):
                self._rows(place[name], rows)
        self._check_vocabulary()
        self._mention_base()
        return dict(self.result), self.config, [*self.places.notes, *self.notes]

    def _find(self, wanted: Sequence[str]) -> dict[str, Place]:
        """The places of the adapter's tensors; not all of a tied group need be stored."""
        known, apart = {}, {}
        for name in wanted:
            stored = next((each for each in self._group(name) if each in self.result), None)
            if stored is None or name in self.result:
                continue
            if self._is_apart(name):
                shape = self.result[stored].shape
                apart[name] = Place(name, shape, (whole_piece(name, shape),))
            else:
                known[name] = stored
        return self.places.find([name for name in wanted if name not in apart], known) | apart

    def _as_is(self, place: Place) -> Place:
        """The place with its present shape: the adapter may have resized an embedding."""
        stored = self.result[place.stored]
        if place.pieces != (whole_piece(place.stored, place.shape),) or stored.shape == place.shape:
            return place
        return Place(place.name, stored.shape, (whole_piece(place.stored, stored.shape),))

    def _group(self, name: str) -> tuple[str, ...]:
        """The tensors tied to this one; () if it is not tied."""
        return next((group for group in self.groups if name in group), ())

    def _check_collisions(self, place: Mapping[str, Place], changes: Sequence[str], stacked: Sequence[Place]) -> None:
        """Checks that no tensor is replaced or changed twice, except in a tied pair, whose changes add up."""
        adapter = self.adapter
        both = set(adapter.tokens) & set(changes)
        if both:
            raise CheckpointError(
                f"{adapter.path}: {some(sorted(both))}: both trained tokens and another change of one tensor, which "
                "cannot be folded here. Fold it with PEFT's merge_and_unload."
            )
        shared = {name for group in self.groups for name in group}
        changed = [place[name] for name in changes] + list(stacked)
        for places in (changed, *([place[name] for name in names] for names in (adapter.saved, adapter.tokens))):
            pieces = [piece for each in places for piece in each.pieces if piece.tensor not in shared]
            twice = [piece.tensor for piece, count in Counter(pieces).items() if count > 1]
            if twice:
                raise CheckpointError(
                    f"{adapter.path}: changes {some(twice)} twice, under different names. Save the adapter again."
                )

    def _is_apart(self, name: str) -> bool:
        """Whether a saved tensor is a module's own (modules_to_save); only then it is not applied to tied tensors."""
        listed = self.adapter.config.get("modules_to_save") or ()
        module = name.rpartition(".")[0]
        return (
            name in self.adapter.saved
            and not self.adapter.config.get("ensure_weight_tying")
            and any(f".{module}".endswith(f".{key}") for key in listed)
        )

    @contextmanager
    def _changing(self, place: Place, module: str) -> Iterator[None]:
        """Wraps a change at a place: checks before it, and applies it to tied tensors after it.

        Raises:
            CheckpointError: the tensors are not floats, or ValueError was raised inside.
        """
        file = self.adapter.files[0].path
        for stored in dict.fromkeys(piece.tensor for piece in place.pieces):
            dtype = self.result[stored].dtype
            if not DTYPES[dtype].is_float or dtype == "F64":
                raise CheckpointError(
                    f"{self.checkpoint.path}: {stored} is {dtype}, and {file} changes it, which is computed in "
                    "float32. Convert the model to float32 or bfloat16."
                )
        try:
            yield
        except ValueError as error:
            raise CheckpointError(
                f"{file}: {module}: {error}; {place.stored} of {self.checkpoint.path} has shape {list(place.shape)}."
                f"{self.places.trained_on()} Name the base model that it was trained on."
            ) from None
        if group := self._group(place.stored):
            self._follow(place.stored, self.result[place.stored])
            note = f"{self.adapter.path}: changes {group[0]}, which is {some(list(group[1:]))} too; both change"
            if note not in self.notes:
                self.notes.append(note)

    def _replace(self, name: str, place: Place, ref: TensorRef) -> None:
        """Replaces a tensor of the model by one of the adapter; embeddings and heads may have other numbers of rows."""
        group = self._group(place.stored)
        old = next(self.result[each] for each in (place.stored, *group) if each in self.result)
        has_rows = bool(group) or is_embedding(place.stored) or is_head(place.stored)
        if ref.shape != place.shape and not (has_rows and ref.shape[1:] == place.shape[1:]):
            raise CheckpointError(
                f"{ref.file}: {ref.name}: expected shape {list(place.shape)}, found {list(ref.shape)}."
                f"{self.places.trained_on()} Name the base model that the adapter was trained on."
            )
        if ref.dtype != old.dtype and not {ref.dtype, old.dtype} <= _FLOATS:
            raise CheckpointError(f"{ref.file}: {ref.name}: is {ref.dtype}, and takes the place of {old.dtype}.")
        new = recast(ref, old.dtype)
        if group and self._is_apart(name):
            self._untie(place.stored, group)
        elif group:
            self._follow(place.stored, new)
        if place.pieces[0] == whole_piece(place.stored, place.shape):
            self.result[place.stored] = new
        else:
            with self._changing(place, name):
                replace(self.result, place, new)

    def _check_vocabulary(self) -> None:
        """An adapter with a resized embedding must have the head too, if the model has one of its own."""
        ends = [name for name in self.result if is_embedding(name) or is_head(name)]
        rows = {name: self.result[name].shape[0] for name in ends}
        before = {self.checkpoint.tensors[name].shape[0] for name in rows if name in self.checkpoint.tensors}
        after = set(rows.values())
        if before == after or not before:
            return
        if len(after) > 1:
            found = ", ".join(f"{name}: {n:,}" for name, n in rows.items())
            raise CheckpointError(
                f"{self.adapter.path}: resizes the vocabulary, but not all that has its rows ({found}). Train and save "
                'it with modules_to_save: ["embed_tokens", "lm_head"], or fold it with PEFT, into the resized model.'
            )
        (n_before,), (n_after,) = before, after
        self.is_resized = True
        said = f"{self.adapter.path}: the vocabulary has {n_after:,} rows for the model's {n_before:,}"
        own = "; the tokenizer is the adapter's" if has_tokenizer(self.adapter.path) else ""
        self.notes.append(said + own)

    def _untie(self, place: str, group: tuple[str, ...]) -> None:
        """Replaces one of several tied tensors; the others keep their values."""
        for each in self.groups:  # the config has one flag for all of them
            shared = next(self.result[name] for name in each if name in self.result)
            self.result.update({name: shared for name in each if name not in self.result})
        self.groups = ()
        self.config = self.config | {"tie_word_embeddings": False}
        text = self.config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:
            self.config["text_config"] = text | {"tie_word_embeddings": False}
        self.notes.append(f"{self.adapter.path}: replaces {place} alone; {' and '.join(group)} are no longer tied")

    def _rows(self, place: Place, tokens: TokenRows) -> None:
        weight, rows, last = self.result[place.stored], tokens.rows, max(tokens.indices, default=0)
        if len(weight.shape) != 2 or rows.shape[1] != weight.shape[1]:
            raise ValueError(f"rows {list(rows.shape)} do not fit")
        if last >= weight.shape[0]:
            raise ValueError(
                f"has rows for tokens up to {last:,}, and the embedding ends with {weight.shape[0] - 1:,}. Fold it "
                "with PEFT, into the model with its embeddings resized"
            )
        self.result[place.stored] = replace_rows(weight, rows, tokens.indices)

    def _follow(self, place: str, ref: TensorRef) -> None:
        """Changes all stored copies of tied tensors together."""
        self.result.update({name: ref for name in self._group(place) if name in self.result})

    def _is_inputs_first(self, place: Place, is_said: bool) -> bool:
        """Whether a module's matrix is stored (in, out), if its shape does not tell."""
        if self.config.get("model_type") in _CONV1D_MODELS:
            return place.stored.split(".")[-2] in _CONV1D_NAMES
        return is_said

    def _bias(self, place: Place) -> Place | None:
        """The bias beside a weight, if there is one."""
        name = place.name.removesuffix(".weight") + ".bias"
        stored = place.stored.removesuffix(".weight") + ".bias"
        if stored in self.result:
            return self.places.find([name], {name: stored})[name]
        loaded = self.places.loaded if len(place.pieces) > 1 else None
        return self.places.find([name], {})[name] if loaded is not None and name in loaded.pieces else None

    def _check_floats(self) -> None:
        """Checks that factors have a dtype that can be read as float32."""
        adapter = self.adapter
        parts = [ref for each in adapter.modules.values() for ref in (each.a, each.b, each.magnitude, each.bias) if ref]
        parts += [ref for factors in adapter.parameters.values() for ref in (factors.a, factors.b)]
        parts += [ref for other in adapter.others.values() for ref in other.parts.values()]
        for ref in parts:
            if ref.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{ref.file}: {ref.name}: is {ref.dtype}; expected F32, BF16 or F16. Save it in float32."
                )

    def _mention_base(self) -> None:
        name = self.adapter.base_name
        base = self.checkpoint.ref
        known = {base.path, os.path.basename(self.checkpoint.path), base.text, base.path.rpartition("/")[2]}
        if name is not None and name not in known and name.rstrip("/").rpartition("/")[2] not in known:
            self.notes.append(f"{self.adapter.path}: was trained on {name}, and is folded into {base.path}")
        seen = trained_on(self.adapter.path, self.adapter.config)
        if seen is not None and not is_dequantized(self.checkpoint.path):
            self.notes.append(
                f"{self.adapter.path}: was trained on a base of 4 bits (QLoRA), and is folded into weights that differ "
                "from it by their rounding. The base that it saw: "
                f"merge quantize {base.path} -o BASE --to {seen} --dequantize"
            )
        if self.adapter.revision is not None:
            self.notes.append(f"{self.adapter.ref.text}: adapter of commit {self.adapter.revision}")
