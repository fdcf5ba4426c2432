"""Computes the new rows of a transplant: combinations of shared tokens' rows, found by omp, kept in a file.

Each batch is computed by one thread, so the bytes do not depend on their number; a finished file is taken again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from merge.arrays import F32
from merge.checkpoint.digest import value_digest
from merge.checkpoint.reader import SourceReader
from merge.errors import OutputError, UsageError
from merge.jsontext import parse_json
from merge.plan import SourceFile, TensorRef
from merge.sources.rows import RowMap, rows_ref
from merge.tools.transplant import omp
from merge.tools.transplant.plan import Matrix, Transplant, header_of


def make_rows(
    transplant: Transplant,
    path: Path,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> SourceFile | None:
    """Writes the combined rows as float32 to `path`, unless it holds just these; None where there are none."""
    if not transplant.combined or not transplant.matrices:
        return None
    assert transplant.donor_checkpoint is not None
    files = (*transplant.inputs.donor.checkpoint.files, *transplant.donor_checkpoint.files)
    unfinished = path.with_name(path.name + ".tmp")
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(SourceReader(files))
            digest = _digest(transplant, reader, device)
            if (kept := _kept(path, digest)) is not None:
                reader.check_unchanged()
                transplant.residuals.update(kept)
                progress(transplant.bytes_combined)
                return _source_file(path, digest)
            header, places = header_of(transplant, digest)
            out = stack.enter_context(unfinished.open("w+b"))
            for matrix in transplant.matrices:
                errors: list[float] = []
                for first, rows, error in _combinations(transplant, matrix, reader, threads, device):
                    out.seek(places[matrix.name] + first * rows.shape[1] * 4)
                    out.write(np.ascontiguousarray(rows, "<f4").tobytes())
                    errors += error
                    done += rows.nbytes
                    progress(done)
                transplant.residuals[matrix.name] = float(np.mean(errors))
            header, _ = header_of(transplant, digest)
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
    return _source_file(path, digest)


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


def _digest(transplant: Transplant, reader: SourceReader, device: str) -> str:
    """Of everything the rows follow from; of the models, the matrices themselves."""
    matrices = [[value_digest(reader, ref) for ref in (each.ours, each.theirs)] for each in transplant.matrices]
    shared = hashlib.sha256(json.dumps([sorted(transplant.shared.items()), transplant.combined]).encode()).hexdigest()
    facts = [matrices, transplant.method, transplant.k, shared, device]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _kept(path: Path, digest: str) -> dict[str, float] | None:
    """Residuals of a file that an earlier run finished, if it is of the same transplant."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, 1 << 20)))
        metadata = header["__metadata__"]
        if metadata["digest"] == digest:
            return {name: float(value) for name, value in parse_json(metadata["residuals"]).items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _source_file(path: Path, digest: str) -> SourceFile:
    return SourceFile.now(os.path.abspath(path), made_from=digest)


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
    """The number of threads that fit the memory.

    Raises:
        UsageError: not even one.
    """
    while max_ram is not None and threads > 1 and peak_bytes(transplant, threads) > max_ram:
        threads -= 1
    needed = peak_bytes(transplant, threads)
    if max_ram is not None and needed > max_ram:
        raise UsageError(
            f"--max-ram {max_ram >> 20}MiB is too little: omp holds the rows of shared tokens, which takes "
            f"{-(-needed >> 20)}MiB with one thread. Use --method mean, which needs little memory."
        )
    return threads
