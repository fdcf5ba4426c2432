"""Gives a model another model's tokenizer: shared tokens keep their rows, the others get new ones.

The combinations are found first (rows.py), and the new rows are written to OUT.rows.safetensors; then an ordinary
plan puts the matrices together. Nothing is computed twice if that is interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from merge.architecture import is_embedding, is_head
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.hub import locate_tokenizer
from merge.errors import CheckpointError, RecipeError, UsageError, first_line
from merge.jobs.build import build_plan
from merge.jobs.vocabulary.rows import Vocabulary, vocabulary_tensors
from merge.output.shards import header_text
from merge.plan import Plan, SourceFile, Stored, TensorRef
from merge.planned import Planned
from merge.planning.inputs import Inputs, open_inputs
from merge.planning.resolve import made_recipe
from merge.recipe.model import ModelRef, Recipe, Source
from merge.sources.rows import RowMap, rows_ref
from merge.tools.transplant import omp
from merge.vocabulary.memory import tokenizer_memory
from merge.vocabulary.surface import same_tokens, surfaces
from merge.vocabulary.tokenizer import Tokenizer, read_tokenizer

Pairs = dict[int, list[tuple[int, int]] | None]


@dataclass(frozen=True)
class Matrix:
    """One matrix whose new rows are combinations: the donor's, and the model's under its common name."""

    name: str
    ours: TensorRef
    theirs: TensorRef


@dataclass
class Transplant:
    """The task of a transplant, and its result.

    Attributes:
        shared: donor's id -> the model's id, of tokens that both have rows for.
        new: the donor's ids that the model has no row for.
        residuals: mean relative error of the combinations in the donor's space, by tensor.
    """

    model: ModelRef
    donor: ModelRef
    method: str
    k: int
    ours: Tokenizer
    theirs: Tokenizer
    inputs: Inputs
    donor_checkpoint: Checkpoint | None
    n_rows: int
    shared: dict[int, int]
    new: list[int]
    combined: list[int]
    matrices: list[Matrix]
    residuals: dict[str, float]

    @property
    def bytes_held(self) -> int:
        """Predicted bytes for finding combinations on one thread: shared rows of both as float32, and one batch."""
        if not self.matrices or not self.combined:
            return 0
        return max(
            4 * len(self.shared) * (matrix.theirs.shape[1] + matrix.ours.shape[1])
            + omp.held_bytes(len(self.shared), matrix.theirs.shape[1], self.k)
            for matrix in self.matrices
        )

    @property
    def bytes_combined(self) -> int:
        return sum(4 * len(self.combined) * matrix.ours.shape[1] for matrix in self.matrices)


def prepare(model: ModelRef, donor: ModelRef, method: str = "omp", k: int = 64) -> Transplant:
    """Matches the tokens of both.

    Raises:
        UsageError: fewer than k tokens are shared.
        RecipeError, CheckpointError: a model or tokenizer that cannot be used.
    """
    inputs = open_inputs(_recipe(model, donor, method, k)).value
    ours = read_tokenizer(inputs.donor.checkpoint.path, model.text)
    directory = locate_tokenizer(donor)
    theirs = read_tokenizer(directory, donor.text)
    weights = any(name.endswith((".safetensors", ".bin")) for name in os.listdir(directory))
    if method == "omp" and not weights:
        raise CheckpointError(
            f"{directory}: has a tokenizer but no weights, and omp needs the donor's embeddings. Use --method mean."
        )
    checkpoint = open_checkpoint(donor) if weights else None
    rows = _embedding(inputs.donor.tensors, model.text).shape[0]
    n_rows, known = theirs.n_ids, theirs.n_ids
    if checkpoint is not None:
        known = _embedding(checkpoint.tensors, donor.text).shape[0]
        n_rows = max(n_rows, known)
    shared = {theirs_id: ours_id for theirs_id, ours_id in same_tokens(ours, theirs).items() if ours_id < rows}
    new = sorted(number for number in theirs.vocabulary.values() if number not in shared)
    transplant = Transplant(model, donor, method, k, ours, theirs, inputs, checkpoint, n_rows, shared, new, [], [], {})
    if method == "omp" and checkpoint is not None:
        transplant.combined = [number for number in new if number < known]
        transplant.matrices = _matrices(inputs, checkpoint)
        n_atoms = sum(number < known for number in shared)
        if transplant.combined and n_atoms < k:
            raise UsageError(
                f"--k {k}: {model.text} and {donor.text} share {n_atoms:,} tokens only. "
                "Give a smaller --k, or use --method mean."
            )
    return transplant


def _recipe(model: ModelRef, donor: ModelRef, method: str, k: int) -> Recipe:
    options = f"--method {method}" + (f" --k {k}" if method == "omp" else "")
    command = f"# made by: merge transplant {model.text} {donor.text} {options}\n"
    return made_recipe(Recipe("passthrough", (Source(model),), tokenizer_source=donor.text, text=command))


def _embedding(tensors: Mapping[str, TensorRef], owner: str) -> TensorRef:
    for name, ref in tensors.items():
        if is_embedding(name) and len(ref.shape) == 2:
            return ref
    raise RecipeError(f"{owner}: found no embedding matrix (embed_tokens, wte, word_embeddings ...).")


def _matrices(inputs: Inputs, donor: Checkpoint) -> list[Matrix]:
    """The model's embedding and, where it is not tied, its head, each with the donor's (a tied head: its embedding)."""
    embedding = _embedding(donor.tensors, donor.ref.text)
    head = next((ref for name, ref in donor.tensors.items() if is_head(name) and len(ref.shape) == 2), embedding)
    found = [
        Matrix(name, ref, head if is_head(name) else embedding)
        for name, ref in inputs.donor.tensors.items()
        if (is_embedding(name) or is_head(name)) and len(ref.shape) == 2
    ]
    for matrix in found:
        for ref in (matrix.ours, matrix.theirs):
            if ref.dtype == "F64":
                raise RecipeError(f"{ref.file}: {ref.name}: float64 embeddings are not supported; convert to float32.")
    return found


def plan_transplant(transplant: Transplant, rows: SourceFile | None, shard_bytes: int, name: str) -> Plan:
    """The plan that writes the model with its new vocabulary."""
    recipe = _recipe(transplant.model, transplant.donor, transplant.method, transplant.k)
    recipe = dataclasses.replace(recipe, name=name)
    plan = build_plan(
        recipe,
        shard_bytes=shard_bytes,
        vocabulary_of=lambda recipe, inputs: Planned(_arrange(transplant, inputs, rows)),
    )
    notes = (*plan.notes, summary(transplant))
    return dataclasses.replace(plan, notes=notes, statistics_files=() if rows is None else (rows,))


def summary(transplant: Transplant) -> str:
    """One line for notes and manifest."""
    said = f"{len(transplant.shared):,} tokens shared with {transplant.donor.text}, {len(transplant.new):,} new"
    if transplant.combined:
        errors = ", ".join(f"{name} {value:.1%}" for name, value in transplant.residuals.items())
        said += f", {len(transplant.combined):,} of them combined of {transplant.k} shared ones"
        said += f" (mean relative error in the donor's space: {errors})"
    return said


def _arrange(transplant: Transplant, inputs: Inputs, rows: SourceFile | None) -> tuple[Vocabulary, Inputs]:
    """The donor's tokenizer, and the inputs with the model's vocabulary tensors in its order."""
    model = inputs.donor
    pieces = _pieces(transplant) if transplant.method in ("omp", "mean") else {}
    _, places = header_of(transplant, "0" * 64) if rows is not None else (b"", {})
    replaced = dict(model.tensors)
    for name in vocabulary_tensors(model):
        ref = model.tensors[name]
        sources = [ref]
        own = np.full(transplant.n_rows, -1, np.int32)
        own[list(transplant.shared)] = list(transplant.shared.values())
        pairs: Pairs = dict.fromkeys(np.flatnonzero(own < 0).tolist())
        for number in transplant.new:
            pairs[number] = [] if transplant.method == "zero" else pieces.get(number)
        if rows is not None and name in places:
            shape = (len(transplant.combined), ref.shape[1])
            sources.append(Stored(name, "F32", shape, rows.path, places[name]))
            for place, number in enumerate(transplant.combined):
                pairs[number] = [(1, place)]
        flat = len(ref.shape) == 2 and ref.shape[0] == 1
        whole = (1, transplant.n_rows) if flat else (transplant.n_rows, *ref.shape[1:])
        replaced[name] = rows_ref(ref.name, tuple(sources), RowMap.of(own, pairs), whole)
    arranged = dataclasses.replace(inputs, all=(dataclasses.replace(model, tensors=replaced),))
    ids = dict(transplant.theirs.vocabulary)
    memory = tokenizer_memory([transplant.theirs, transplant.ours])
    return Vocabulary(transplant.theirs, None, None, ids, transplant.ours, memory), arranged


def _pieces(transplant: Transplant) -> dict[int, list[tuple[int, int]]]:
    """Donor's id of a new token -> the model's rows of the pieces its text is cut into; special tokens have none."""
    import tokenizers

    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(transplant.ours.data))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(
            f"{transplant.ours.directory}: the tokenizers library cannot read it ({first_line(error)})."
        ) from error
    encoder.no_truncation()
    encoder.no_padding()
    rows = _embedding(transplant.inputs.donor.tensors, transplant.model.text).shape[0]
    texts = surfaces(transplant.theirs)
    wanted = [(number, texts[number].decode("utf-8", "ignore")) for number in transplant.new if number in texts]
    found: dict[int, list[tuple[int, int]]] = {}
    encoded: list[Any] = encoder.encode_batch([text for _, text in wanted], add_special_tokens=False)
    for (number, _), encoding in zip(wanted, encoded, strict=True):
        pairs = [(0, piece) for piece in encoding.ids if piece < rows]
        if pairs:
            found[number] = pairs
    return found


def header_of(transplant: Transplant, digest: str) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, of a length that does not depend on the residuals, and each tensor's place."""
    names = [matrix.name for matrix in transplant.matrices]
    residuals = {name: f"{transplant.residuals.get(name, 0.0):.6f}".rjust(12) for name in names}
    shapes = {matrix.name: (len(transplant.combined), matrix.ours.shape[1]) for matrix in transplant.matrices}
    return header_text(shapes, {"digest": digest, "residuals": json.dumps(residuals)})
