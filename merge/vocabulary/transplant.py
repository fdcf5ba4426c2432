"""A model with another model's tokenizer: tokens that both have keep their rows, the others get new ones.

    omp        combinations of shared tokens that give the donor's row in the donor's space, made of the model's rows
    mean       the mean of the rows of the pieces into which the model's tokenizer cuts the new token's text
    zero       zeros
    copy-only  the mean of all rows that were copied

The combinations are found first, and the new rows are written to OUT.rows.safetensors; then an ordinary plan puts the
matrices together. Nothing is computed twice if that is interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge.architecture import is_embedding, is_head
from merge.checkpoint import Checkpoint, open_checkpoint
from merge.checkpoint.hub import locate_tokenizer
from merge.checkpoint.reader import SourceReader
from merge.derive.rows import RowMap, rows_ref
from merge.errors import CheckpointError, OutputError, RecipeError, UsageError
from merge.output.shards import header_text
from merge.plan import Plan, SourceFile, TensorRef
from merge.planners.build import build_plan
from merge.planners.inputs import Inputs
from merge.planners.token_rows import Vocabulary, vocabulary_tensors
from merge.recipe import parse_recipe
from merge.recipe.model import ModelRef
from merge.vocabulary import omp
from merge.vocabulary.surface import same_tokens, surfaces
from merge.vocabulary.tokenizer import Tokenizer, read_tokenizer

METHODS = ("omp", "mean", "zero", "copy-only")
F32 = npt.NDArray[np.float32]
Pairs = dict[int, list[tuple[int, int]] | None]


@dataclass(frozen=True)
class Matrix:
    """One matrix whose new rows are combinations: the donor's, and the model's under its common name."""

    name: str
    ours: TensorRef
    theirs: TensorRef


@dataclass
class Transplant:
    """What is to be done, and what became of it.

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
    inputs = Inputs(parse_recipe(_recipe(model, donor, method, k)))
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


def _recipe(model: ModelRef, donor: ModelRef, method: str, k: int) -> str:
    options = f"--method {method}" + (f" --k {k}" if method == "omp" else "")
    return (
        f"# made by: merge transplant {model.text} {donor.text} {options}\n"
        f"merge_method: passthrough\nmodels: [{{model: {json.dumps(model.text)}}}]\n"
        f"tokenizer_source: {json.dumps(donor.text)}\n"
    )


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


# The new rows.


def make_rows(
    transplant: Transplant,
    path: Path,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> SourceFile | None:
    """Writes the combined rows as float32 to `path`, unless it holds just these; None where there are none.

    Each batch is computed by one thread, so the bytes do not depend on their number.
    """
    if not transplant.combined or not transplant.matrices:
        return None
    assert transplant.donor_checkpoint is not None
    files = (*transplant.inputs.donor.checkpoint.files, *transplant.donor_checkpoint.files)
    digest = _digest(transplant, files, device)
    if (kept := _kept(path, digest)) is not None:
        transplant.residuals.update(kept)
        progress(transplant.bytes_combined)
        return _source_file(path)
    header, places = _header(transplant, digest)
    unfinished = path.with_name(path.name + ".tmp")
    done = 0
    try:
        with SourceReader(files) as reader, unfinished.open("w+b") as out:
            for matrix in transplant.matrices:
                errors: list[float] = []
                for first, rows, error in _combinations(transplant, matrix, reader, threads, device):
                    out.seek(places[matrix.name] + first * rows.shape[1] * 4)
                    out.write(np.ascontiguousarray(rows, "<f4").tobytes())
                    errors += error
                    done += rows.nbytes
                    progress(done)
                transplant.residuals[matrix.name] = float(np.mean(errors))
            header, _ = _header(transplant, digest)
            out.seek(0)
            out.write(len(header).to_bytes(8, "little") + header)
            out.flush()
            os.fsync(out.fileno())
            reader.check_unchanged()
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(f"{unfinished}: cannot write: {error.strerror or error}. Choose another --out.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return _source_file(path)


def _combinations(
    transplant: Transplant, matrix: Matrix, reader: SourceReader, threads: int, device: str
) -> Iterator[tuple[int, F32, list[float]]]:
    """(place of the first row, rows, relative errors), batch by batch, in order."""
    import torch

    known = matrix.theirs.shape[0]
    atoms_of = [number for number in sorted(transplant.shared) if number < known]
    atoms = _rows(reader, matrix.theirs, atoms_of)
    ours = _rows(reader, matrix.ours, [transplant.shared[number] for number in atoms_of])
    size = omp.batch_size(len(atoms))
    before = torch.get_num_threads()

    def work(first: int) -> tuple[int, F32, list[float]]:
        torch.set_num_threads(1)
        targets = _rows(reader, matrix.theirs, transplant.combined[first : first + size])
        chosen, coefficients = omp.match(targets, atoms, transplant.k, device)
        left = targets - omp.combine(chosen, coefficients, atoms)
        norms = np.maximum(np.linalg.norm(targets.astype(np.float64), axis=1), 1e-30)
        return first, omp.combine(chosen, coefficients, ours), (np.linalg.norm(left, axis=1) / norms).tolist()

    pool = ThreadPoolExecutor(max(1, threads))
    try:
        starts = list(range(0, len(transplant.combined), size))
        pending = []
        for first in starts:  # never more batches under way than threads, so that memory is bounded
            pending.append(pool.submit(work, first))
            if len(pending) > threads:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _rows(reader: SourceReader, ref: TensorRef, numbers: Sequence[int]) -> F32:
    """(len(numbers), width) float32 rows of a matrix."""
    width = ref.shape[1]
    row_map = RowMap.of(np.asarray(numbers, np.int32), {})
    chosen = rows_ref(ref.name, (ref,), row_map, (len(numbers), width))
    out = np.empty(len(numbers) * width, np.float32)
    reader.read_values(chosen, 0, out)
    reader.release([chosen])
    return out.reshape(-1, width)


def _digest(transplant: Transplant, files: Sequence[SourceFile], device: str) -> str:
    shared = hashlib.sha256(json.dumps([sorted(transplant.shared.items()), transplant.combined]).encode()).hexdigest()
    facts = [[dataclasses.astuple(file) for file in files], transplant.method, transplant.k, shared, device]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _header(transplant: Transplant, digest: str) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, of a length that does not depend on the residuals, and each tensor's place."""
    residuals = {name: f"{transplant.residuals.get(name, 0.0):.6f}".rjust(12) for name in _names(transplant)}
    shapes = {matrix.name: (len(transplant.combined), matrix.ours.shape[1]) for matrix in transplant.matrices}
    return header_text(shapes, {"digest": digest, "residuals": json.dumps(residuals)})


def _names(transplant: Transplant) -> list[str]:
    return [matrix.name for matrix in transplant.matrices]


def _kept(path: Path, digest: str) -> dict[str, float] | None:
    """Residuals of a file that an earlier run finished, if it is of the same transplant."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 1 << 20)))
        metadata = header["__metadata__"]
        if metadata["digest"] == digest:
            return {name: float(value) for name, value in json.loads(metadata["residuals"]).items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _source_file(path: Path) -> SourceFile:
    info = os.stat(path)
    return SourceFile(os.path.abspath(path), info.st_size, info.st_mtime_ns)


# The plan.


def plan_transplant(transplant: Transplant, rows: SourceFile | None, shard_bytes: int, name: str) -> Plan:
    """The plan that writes the model with its new vocabulary."""
    recipe = parse_recipe(_recipe(transplant.model, transplant.donor, transplant.method, transplant.k))
    recipe = dataclasses.replace(recipe, name=name)
    plan = build_plan(
        recipe,
        shard_bytes=shard_bytes,
        vocabulary_of=lambda recipe, inputs, problems: _arrange(transplant, inputs, rows),
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


def _arrange(transplant: Transplant, inputs: Inputs, rows: SourceFile | None) -> Vocabulary:
    """Replaces the model's vocabulary tensors, and gives the donor's tokenizer."""
    model = inputs.donor
    pieces = _pieces(transplant) if transplant.method in ("omp", "mean") else {}
    _, places = _header(transplant, "0" * 64) if rows is not None else (b"", {})
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
            sources.append(TensorRef(rows.path, name, "F32", shape, places[name]))
            for place, number in enumerate(transplant.combined):
                pairs[number] = [(1, place)]
        flat = len(ref.shape) == 2 and ref.shape[0] == 1
        whole = (1, transplant.n_rows) if flat else (transplant.n_rows, *ref.shape[1:])
        replaced[name] = rows_ref(ref.name, tuple(sources), RowMap.of(own, pairs), whole)
    inputs.all = [dataclasses.replace(model, tensors=replaced)]
    ids = dict(transplant.theirs.vocabulary)
    return Vocabulary(transplant.theirs, None, None, ids, transplant.ours)


def _pieces(transplant: Transplant) -> dict[int, list[tuple[int, int]]]:
    """Donor's id of a new token -> the model's rows of the pieces its text is cut into; special tokens have none."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_str(json.dumps(transplant.ours.data))
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


# Memory.


def peak_bytes(transplant: Transplant, threads: int) -> int:
    """Predicted resident bytes while combinations are found."""
    from merge.engine.memory import INTERPRETER, TORCH

    if not transplant.bytes_combined:
        return INTERPRETER
    batch = max(
        omp.held_bytes(len(transplant.shared), matrix.theirs.shape[1], transplant.k) for matrix in transplant.matrices
    )
    return INTERPRETER + TORCH + transplant.bytes_held + (threads - 1) * batch


def threads_within(transplant: Transplant, threads: int, max_ram: int | None) -> int:
    """As many threads as there is room for.

    Raises:
        UsageError: not even one.
    """
    while max_ram is not None and threads > 1 and peak_bytes(transplant, threads) > max_ram:
        threads -= 1
    needed = peak_bytes(transplant, threads)
    if max_ram is not None and needed > max_ram:
        raise UsageError(
            f"--max-ram {max_ram >> 20}MiB is too little: omp holds the rows of shared tokens, which takes "
            f"{-(-needed >> 20)}MiB with one thread. Use --method mean, which needs little."
        )
    return threads
