"""tokenizer_source and tokenizer, planned: one vocabulary for the output, in whose order all rows are put."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from merge.checkpoint.hub import locate_tokenizer
from merge.errors import Problem, RecipeError
from merge.jobs.vocabulary.rows import Arranger, Vocabulary, vocabulary_rows
from merge.planned import Planned, Said
from merge.planning.inputs import Input, Inputs
from merge.planning.models import first_model
from merge.quoting import counted, quoted
from merge.recipe.mentioned import key_of
from merge.recipe.model import ModelRef, Recipe, TokenizerSettings
from merge.recipe.references import parse_reference
from merge.vocabulary.files import check_loads, named_in
from merge.vocabulary.memory import tokenizer_memory
from merge.vocabulary.tokenizer import Tokenizer, has_tokenizer, read_tokenizer
from merge.vocabulary.union import unite


def plan_vocabulary(recipe: Recipe, inputs: Inputs) -> Planned[tuple[Vocabulary | None, Inputs]]:
    """The vocabulary that the recipe asks for, if any, and the inputs with their tensors in its order.

    Raises:
        CheckpointError: a tokenizer is missing or damaged.
        RecipeError: tokenizers that cannot be united.
    """
    if recipe.tokenizer_source is None:
        return Planned((None, inputs))
    where = recipe.where("tokenizer" if recipe.tokenizer is not None else "tokenizer_source")
    said = Said()
    try:
        owner, other = _source(recipe, inputs)
        tokenizers = said.take(_read_all(inputs))
        vocabulary = said.take(_choose(recipe, inputs, tokenizers, owner, other))
        settings = recipe.tokenizer or TokenizerSettings()
        arranged = said.take(Arranger(recipe, inputs, tokenizers, vocabulary, settings, where).arrange())
    except RecipeError as error:
        raise RecipeError(
            [problem if problem.where else dataclasses.replace(problem, where=where) for problem in error.problems]
        ) from None
    return said.with_value((vocabulary, arranged))


def _read_all(inputs: Inputs) -> Planned[list[Tokenizer]]:
    """Every input's tokenizer; one without is taken to number tokens as the first that has one, if their rows agree."""
    having = [has_tokenizer(model.checkpoint.tokenizer_path) for model in inputs.all]
    if True not in having:
        raise RecipeError(
            f"no model has tokenizer files (tokenizer.json, tokenizer.model ...): {inputs.donor.checkpoint.path} has "
            "none. Copy them there from the model's page."
        )
    found: dict[int, Tokenizer] = {}
    for i, model in enumerate(inputs.all):
        if having[i]:
            twin = next((j for j in found if _same_files(inputs.all[j], model)), None)
            found[i] = found[twin] if twin is not None else _read(model)
    first, notes = having.index(True), []
    for i, model in enumerate(inputs.all):
        if having[i]:
            continue
        ours, theirs = vocabulary_rows(inputs.all[first]), vocabulary_rows(model)
        if ours != theirs:
            raise RecipeError(
                f"{model.ref.text} has no tokenizer, and its embedding has {theirs:,} rows where {found[first].name} "
                f"has {ours:,}, so its tokens are unknown. Copy its tokenizer's files to {model.checkpoint.path}."
            )
        notes.append(f"{model.ref.text} has no tokenizer; its rows are taken to be in {found[first].name}'s order")
        found[i] = found[first]
    return Planned([found[i] for i in range(len(inputs.all))], notes=tuple(notes))


def _read(model: Input) -> Tokenizer:
    return read_tokenizer(model.checkpoint.tokenizer_path, model.ref.text)


def _same_files(first: Input, second: Input) -> bool:
    """Whether two models have the same tokenizer.json and nothing that adds to it."""
    ours, theirs = (Path(model.checkpoint.tokenizer_path) for model in (first, second))
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    return (ours / names[0]).is_file() and all(_bytes(ours / name) == _bytes(theirs / name) for name in names)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _source(recipe: Recipe, inputs: Inputs) -> tuple[int | None, ModelRef | None]:
    """The model whose tokenizer the recipe names: its index in Inputs.all, or a model that is not merged."""
    if recipe.tokenizer_source == "union":
        return 0, None
    owner = inputs.place(first_model(recipe))
    if recipe.tokenizer_source != "base":
        assert recipe.tokenizer_source is not None
        ref = parse_reference(recipe.tokenizer_source, None if recipe.file is None else Path(recipe.file).parent)
        found = next((i for i, model in enumerate(inputs.all) if _is(ref, model.ref)), None)
        if found is None:
            return None, ref
        owner = found
    checkpoint = inputs.all[owner].checkpoint
    if not has_tokenizer(checkpoint.tokenizer_path):
        said = f"{checkpoint.ref.text} has no tokenizer files (tokenizer.json, tokenizer.model, vocab.json ...)."
        raise RecipeError(Problem(said, None, "Name a model that has them."))
    return owner, None


def _is(ref: ModelRef, model: ModelRef) -> bool:
    """Whether a tokenizer_source names a model or the model's adapter."""
    return ref == model or (model.adapter is not None and key_of(ref) == key_of(model.adapter))


def _choose(
    recipe: Recipe, inputs: Inputs, tokenizers: Sequence[Tokenizer], owner: int | None, other: ModelRef | None
) -> Planned[Vocabulary]:
    """The output's tokenizer: one model's own, or a new one where tokens are added or have no row."""
    extra = tuple(recipe.tokenizer.tokens) if recipe.tokenizer is not None else ()
    if recipe.tokenizer_source == "union":
        chosen = list({id(tokenizer): tokenizer for tokenizer in tokenizers}.values())
    elif other is not None:
        chosen = [read_tokenizer(locate_tokenizer(other), other.text)]
    else:
        assert owner is not None
        chosen = [tokenizers[owner]]
    notes = []
    lost = _without_row(inputs, tokenizers, chosen) if owner is not None else ()
    if lost:
        notes.append(
            f"{len(lost):,} added tokens have a number behind the last row of the embedding in every model and are "
            f"left out: {named_in(lost)}"
        )
    united = unite(chosen, extra, lost)
    notes += united.notes
    changed = united if united.n_new or lost else None
    if changed is not None:
        check_loads(changed, chosen[0].name)
        notes.append(f"the tokenizer is {chosen[0].name}'s with {counted(united.n_new, 'token')} added")
    memory = tokenizer_memory([*tokenizers, *chosen], changed)
    vocabulary = Vocabulary(chosen[0], changed, owner, united.vocabulary, tokenizers[0], memory)
    return Planned(vocabulary, notes=tuple(notes))


def _without_row(inputs: Inputs, tokenizers: Sequence[Tokenizer], chosen: Sequence[Tokenizer]) -> tuple[str, ...]:
    """Added tokens of the output without a row in any model: their ids are beyond the last row."""
    rows = [vocabulary_rows(model) for model in inputs.all]
    behind: dict[str, Tokenizer] = {}
    for tokenizer in chosen:
        for token, number in tokenizer.vocabulary.items():
            if number >= min(rows):
                behind.setdefault(token, tokenizer)
    lost = []
    for token, tokenizer in behind.items():
        if any(other.vocabulary.get(token, n) < n for other, n in zip(tokenizers, rows, strict=True)):
            continue
        if token not in tokenizer.added or token in tokenizer.data["model"]["vocab"]:
            n = max(n for n, other in zip(rows, tokenizers, strict=True) if other is tokenizer)
            raise RecipeError(
                f"the tokenizer of {tokenizer.name} has the token {quoted(token)} at {tokenizer.vocabulary[token]:,}, "
                f"but the embedding has {n:,} rows only. The files do not belong together; download them again."
            )
        lost.append(token)
    return tuple(lost)
