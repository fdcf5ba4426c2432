"""Every model's rows in the order of the output's vocabulary.

A token that a model has keeps that model's row. One that it lacks gets the row that `tokens` names, else the base's,
else the mean over the models that have it, else zeros; models that the tensor is merged from come before others. Rows
without a token (padding) are kept where the tokenizer is one model's own, as if each were a token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge.architecture import is_embedding, is_head, is_input_side
from merge.arrays import I32
from merge.errors import Problem, RecipeError
from merge.plan import TensorRef
from merge.planned import Planned, Said
from merge.planning.inputs import Input, Inputs
from merge.quoting import quoted
from merge.recipe.model import Recipe, TokenizerSettings, TokenRow
from merge.sources.rows import RowMap, rows_ref
from merge.vocabulary.files import named_in, renumbered
from merge.vocabulary.memory import TokenizerMemory
from merge.vocabulary.tokenizer import Tokenizer
from merge.vocabulary.union import Union

Pairs = dict[int, list[tuple[int, int]] | None]  # output row -> the (model, row) pairs that it is the mean of
_AUXILIARY = ("bias", "decoder", "head", "logits", "predictions", "embed_tokens")


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokenizer.

    Attributes:
        tokenizer: the one whose files the output gets; `changed` replaces its tokenizer.json, if it is not None.
        owner: index in Inputs.all of the model whose tokenizer it is; None for one that is not merged.
        ids: token -> id in the output.
        donor: the tokenizer of the model whose config.json is the output's.
        memory: bytes of all tokenizers that were read for it.
    """

    tokenizer: Tokenizer
    changed: Union | None
    owner: int | None
    ids: dict[str, int]
    donor: Tokenizer
    memory: TokenizerMemory

    def adapted(self, config: dict[str, object]) -> Planned[dict[str, object]]:
        """A config of the donor with the token ids (eos_token_id ...) of this vocabulary."""
        return renumbered(config, self.donor.vocabulary, self.ids, self.tokenizer.named)


def vocabulary_rows(model: Input) -> int:
    """Rows of a model's embedding.

    Raises:
        RecipeError: it has none that is known.
    """
    ref = next((ref for name, ref in model.tensors.items() if is_embedding(name) and len(ref.shape) == 2), None)
    if ref is None:
        raise RecipeError(
            f"{model.ref.text}: found no embedding matrix (embed_tokens, wte, word_embeddings ...), so its vocabulary "
            'cannot be arranged. Remove "tokenizer_source".'
        )
    return ref.shape[0]


def vocabulary_tensors(model: Input) -> list[str]:
    """Tensors with an entry for each token: embeddings, heads, and equally long tensors outside the layers."""
    rows = vocabulary_rows(model)
    hidden = next(ref.shape[1] for name, ref in model.tensors.items() if is_embedding(name) and len(ref.shape) == 2)
    found = []
    for name, ref in model.tensors.items():
        if is_embedding(name) or is_head(name):
            found.append(name)
        elif rows != hidden and _per_token(ref, rows) and any(word in name for word in _AUXILIARY):
            if not any(stack.layer(name) for stack in model.stacks) and "position" not in name:
                found.append(name)
        elif "embed_tokens" in name and len(ref.shape) == 2:
            found.append(name)
    return found


class Arranger:
    """Arranges every model's vocabulary tensors in the order of the output's vocabulary."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        tokenizers: Sequence[Tokenizer],
        vocabulary: Vocabulary,
        settings: TokenizerSettings,
        where: str | None,
    ) -> None:
        self.recipe, self.inputs, self.settings = recipe, inputs, settings
        self.tokenizers, self.vocabulary = tokenizers, vocabulary
        self.where = where
        self.said = Said()
        self.rows = [vocabulary_rows(model) for model in inputs.all]
        self.n_tokens = max(vocabulary.ids.values(), default=-1) + 1
        self.n_rows = self._n_rows()
        self.own = [self._own_ids(i) for i in range(len(inputs.all))]
        self.has_token = np.zeros(self.n_rows, bool)
        self.has_token[list(vocabulary.ids.values())] = True
        self.once: set[str] = set()

    def _n_rows(self) -> int:
        multiple, owner = self.settings.pad_to_multiple_of, self.vocabulary.owner
        if multiple is not None:
            return -(-self.n_tokens // multiple) * multiple
        if owner is None or (self.vocabulary.changed is not None and self.vocabulary.changed.n_new):
            return self.n_tokens
        return max(self.n_tokens, self.rows[owner])

    def _own_ids(self, model: int) -> I32:
        """(output rows,) the model's row for each, -1 for none. A padding row counts as a token of that number."""
        own = np.full(self.n_rows, -1, np.int32)
        theirs, ours = self.tokenizers[model].vocabulary, self.vocabulary.ids
        numbers = [(number, theirs[token]) for token, number in ours.items() if token in theirs]
        table = np.asarray(numbers, np.int32).reshape(-1, 2)
        own[table[:, 0]] = table[:, 1]
        if self.vocabulary.owner is not None:
            free = np.ones(self.n_rows, bool)
            taken = np.asarray([*ours.values(), *theirs.values()], np.int64)
            free[taken[taken < self.n_rows]] = False
            free[self.rows[self.vocabulary.owner] :] = False
            own[free] = np.flatnonzero(free)
        own[own >= self.rows[model]] = -1
        return own

    def arrange(self) -> Planned[Inputs]:
        names = [vocabulary_tensors(model) for model in self.inputs.all]
        replaced = [dict(model.tensors) for model in self.inputs.all]
        for name in dict.fromkeys(name for found in names for name in found):
            for i, model in enumerate(self.inputs.all):
                if name in model.tensors and (ref := self._arranged(i, name)) is not None:
                    replaced[i][name] = ref
        models = (
            dataclasses.replace(model, tensors=tensors)
            for model, tensors in zip(self.inputs.all, replaced, strict=True)
        )
        return self.said.with_value(dataclasses.replace(self.inputs, all=tuple(models)))

    def _group(self, name: str) -> list[int]:
        """The models that a tensor is merged from, including the base."""
        slices = self.recipe.slices
        if not slices:
            return list(range(len(self.inputs.all)))
        part = slices[0 if is_input_side(name) else -1]
        base = part.base_model or self.recipe.base_model
        refs = [source.model for source in part.sources] + ([base] if base is not None else [])
        return sorted({self.inputs.place(ref) for ref in refs})

    def _arranged(self, model: int, name: str) -> TensorRef | None:
        """A model's tensor in the output's order; None if it stays unchanged or cannot be arranged."""
        ref = self.inputs.all[model].tensors[name]
        rows = self._rows_of(ref)
        identity = self.n_rows == rows and bool((self.own[model] == np.arange(rows)).all())
        if identity and not any(row.force for row in self.settings.tokens.values()):
            return None
        others = [i for i, other in enumerate(self.inputs.all) if name in other.tensors]
        row_map, used = self._map(model, name, others)
        sources = (ref, *(self.inputs.all[i].tensors[name] for i in used))
        if row_map.is_identity(rows) or not self._can_arrange(model, name, sources):
            return None
        flat = rows != ref.shape[0]
        shape = (*ref.shape[:-1], self.n_rows) if flat else (self.n_rows, *ref.shape[1:])
        return rows_ref(ref.name, sources, row_map, shape)

    def _rows_of(self, ref: TensorRef) -> int:
        return ref.shape[-1] if len(ref.shape) == 2 and ref.shape[0] == 1 else ref.shape[0]

    def _can_arrange(self, model: int, name: str, sources: Sequence[TensorRef]) -> bool:
        text = self.inputs.all[model].ref.text
        widths = {math.prod(ref.shape) // max(1, self._rows_of(ref)) for ref in sources}
        if sources[0].shape[0] not in (1, self.rows[model]) and not (is_embedding(name) or is_head(name)):
            said = f"{text}: a vocabulary of its own, with {sources[0].shape[0]:,} rows where the embedding has "
            said += f"{self.rows[model]:,}; which token a row is of is not known."
            self.said.problems.append(Problem(said, name, 'Remove "tokenizer_source", or name this model there.'))
        elif len(widths) > 1:
            found = ", ".join(str(list(ref.shape)) for ref in sources)
            said = f"{text}: rows of other models have another width ({found}), and it lacks some of their tokens."
            self.said.problems.append(Problem(said, name, "Merge models of one hidden size."))
        elif any(ref.dtype == "F64" for ref in sources):
            hint = "Convert the model to float32 first."
            self.said.problems.append(Problem(f"{text}: float64 rows cannot be arranged by vocabulary.", name, hint))
        else:
            return True
        return False

    def _map(self, model: int, name: str, others: Sequence[int]) -> tuple[RowMap, list[int]]:
        """A model's row map for one tensor, and the other models whose rows it uses."""
        own = self._present(model, name)
        settled = own >= 0
        pairs: Pairs = {}
        for token, row in self.settings.tokens.items():
            number = self.vocabulary.ids[token]
            if (row.kind is not None and not settled[number]) or row.force:
                found = self._configured(token, row, name)
                if found is not None:
                    pairs[number], settled[number] = found, True
        lacking = np.flatnonzero(~settled)
        for candidates in (self._group(name), range(len(self.inputs.all))):
            if len(lacking):
                lacking = self._fill(lacking, [i for i in candidates if i in others], name, pairs)
        nowhere = [number for number in lacking.tolist() if self.has_token[number]]
        pairs.update((number, [] if self.has_token[number] else None) for number in lacking.tolist())
        if nowhere:
            self._say_nowhere(nowhere, name)
        used = sorted({i for each in pairs.values() if each for i, _ in each} - {model})
        places = {model: 0} | {i: place for place, i in enumerate(used, 1)}
        placed = {
            number: None if each is None else [(places[i], row) for i, row in each] for number, each in pairs.items()
        }
        return RowMap.of(own, placed), used

    def _present(self, model: int, name: str) -> I32:
        """The model's row of this tensor for each output row; -1 for none."""
        rows = self._rows_of(self.inputs.all[model].tensors[name])
        return np.where(self.own[model] < rows, self.own[model], -1).astype(np.int32)

    def _fill(
        self,
        lacking: npt.NDArray[np.int64],
        candidates: Sequence[int],
        name: str,
        pairs: Pairs,
    ) -> npt.NDArray[np.int64]:
        """Rows for tokens that a model lacks: the base's, else the mean over the candidates that have it."""
        if not candidates:
            return lacking
        table = np.stack([self._present(i, name)[lacking] for i in candidates])
        base = None if self.recipe.base_model is None else self.inputs.place(self.recipe.base_model)
        left = []
        for column, number in enumerate(lacking.tolist()):
            having = [(i, int(row)) for i, row in zip(candidates, table[:, column], strict=True) if row >= 0]
            of_base = [pair for pair in having if pair[0] == base]
            if having:
                pairs[number] = of_base or having
            else:
                left.append(number)
        return np.asarray(left, np.int64)

    def _configured(self, token: str, row: TokenRow, name: str) -> list[tuple[int, int]] | None:
        """The row that `tokens` names for a token; None, with a problem noted, if there is no such row."""
        if row.kind == "zero":
            return []
        assert row.model is not None
        where = self.recipe.where(f"tokenizer.tokens.{token}") or self.where
        try:
            model = self.inputs.place(row.model)
        except KeyError:
            self._wrong(f'the row of {quoted(token)} is to come from "{row.model.text}", which is not merged', where)
            return None
        wanted = token if row.token is None else row.token
        text, vocabulary = self.inputs.all[model].ref.text, self.tokenizers[model].vocabulary
        number = row.token_id if row.token_id is not None else vocabulary.get(wanted)
        if number is None:
            self._wrong(f"{text} has no token {quoted(wanted)} to take the row of {quoted(token)} from", where)
            return None
        if name not in self.inputs.all[model].tensors:
            self._wrong(f"{text} has no tensor {name} to take the row of {quoted(token)} from", where)
            return None
        rows = self._rows_of(self.inputs.all[model].tensors[name])
        if number >= rows:
            self._wrong(f"{text} has no row {number:,} for {quoted(token)}: it has {rows:,} rows", where)
            return None
        return [(model, number)]

    def _wrong(self, message: str, where: str | None) -> None:
        if message not in self.once:
            self.once.add(message)
            self.said.problems.append(Problem(message + ".", where))

    def _say_nowhere(self, numbers: Sequence[int], name: str) -> None:
        tokens = {number: token for token, number in self.vocabulary.ids.items()}
        for number in numbers:
            if (row := self.settings.tokens.get(tokens[number])) is not None and row.kind is None:
                where = self.recipe.where(f"tokenizer.tokens.{tokens[number]}") or self.where
                self._wrong(f'no model has the token {quoted(tokens[number])}: it needs a "source"', where)
        said = f"{name}: no model has {named_in(tokens[number] for number in numbers)}; their rows are zeros"
        if said not in self.once:
            self.once.add(said)
            self.said.notes.append(said)


def _per_token(ref: TensorRef, rows: int) -> bool:
    return (bool(ref.shape) and ref.shape[0] == rows) or ref.shape == (1, rows)
