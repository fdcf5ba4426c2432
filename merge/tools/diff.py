"""diff_models: compares two checkpoints, and the task vectors of two fine-tunes of one base.

Streamed like a merge: blocks, threads, memory that does not grow with the model; the same numbers on any threads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.adapters.fold import open_model
from merge.architecture import find_stacks, main_stack
from merge.architecture.tensor_kinds import KINDS, kind_of
from merge.checkpoint import Checkpoint
from merge.checkpoint.reader import SourceReader
from merge.chunks import CHUNK, Chunks
from merge.dtypes import DTYPES
from merge.engine.crew import Crew
from merge.engine.tensor import Buffers, StepTensor
from merge.kernels.difference import PAIR, TASKS, difference_of
from merge.plan import Step, TensorRef
from merge.planning.common_names import map_prefix, rename
from merge.processors import processors
from merge.recipe.model import ModelRef


@dataclass(frozen=True)
class Sums:
    """Sums over the values of both models, which give all measures and can be added over tensors.

    Attributes:
        size: how many numbers were compared; `changed` of them differ, by at most `largest`.
        aa, ad, dd: squares of a, products of a and d, squares of d = b - a.
        uu, uv, vv, both, agree: of the task vectors u = a - base and v = b - base: squares, products, how many entries
            both changed, and in how many of these the signs agree; zeros without a base.
        nonfinite: numbers that differ and are NaN or infinite in a model; in no other sum.
    """

    size: int = 0
    changed: int = 0
    largest: float = 0.0
    aa: float = 0.0
    ad: float = 0.0
    dd: float = 0.0
    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    both: int = 0
    agree: int = 0
    nonfinite: int = 0

    @staticmethod
    def total(parts: Iterable[Sums]) -> Sums:
        """The sums of several tensors; exact, so in any order."""
        every = list(parts)
        found: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(Sums)):
            values = [getattr(part, name) for part in every]
            if name == "largest":
                found[name] = max(values, default=0.0)
            else:
                found[name] = sum(values) if isinstance(getattr(Sums, name), int) else math.fsum(values)
        return Sums(**found)

    def measures(self, with_base: bool) -> dict[str, float | int | None]:
        """relative: ‖b - a‖/‖a‖; share: of numbers that differ; cosine of a and b; of task vectors, with a base: their
        norms, their cosine, and the share of equal signs where both changed a number. None where it is not defined."""
        bb = self.aa + 2 * self.ad + self.dd
        found: dict[str, float | int | None] = {
            "size": self.size,
            "changed": self.changed,
            "share": _ratio(self.changed, self.size),
            "relative": _ratio(math.sqrt(self.dd), math.sqrt(self.aa)),
            "largest": self.largest,
            "cosine": 1.0 if not self.dd and self.aa else _cosine(self.aa + self.ad, self.aa, bb),
            "nonfinite": self.nonfinite,
        }
        if with_base:
            found |= {
                "norm_a": math.sqrt(self.uu),
                "norm_b": math.sqrt(self.vv),
                "task_cosine": _cosine(self.uv, self.uu, self.vv),
                "both": self.both,
                "sign_agreement": _ratio(self.agree, self.both),
            }
        return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _cosine(product: float, square_a: float, square_b: float) -> float | None:
    norm = math.sqrt(max(0.0, square_a)) * math.sqrt(max(0.0, square_b))
    return max(-1.0, min(1.0, product / norm)) if norm else None


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that both models have, in the same shape. `layer`: its number in the main stack; None outside."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    sums: Sums


@dataclass(frozen=True)
class Diff:
    """The result of `merge diff`.

    Attributes:
        added, removed: tensors that only b has, and only a.
        reshaped: name, shape in a, shape in b.
        tensors: those of one name and shape, changed or not.
        config: key, value in a, value in b; None where it is missing.
        side_files: tokenizer and other small files that differ or are missing on one side.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    tensors: tuple[TensorDiff, ...]
    config: tuple[tuple[str, Any, Any], ...]
    side_files: tuple[str, ...]
    with_base: bool
    notes: tuple[str, ...]

    @property
    def retyped(self) -> tuple[TensorDiff, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.dtypes[0] != tensor.dtypes[1])

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The tensors with different values, the most changed first."""
        found = [tensor for tensor in self.tensors if tensor.sums.changed]
        return tuple(sorted(found, key=lambda t: (-(t.sums.measures(False)["relative"] or math.inf), t.name)))

    @property
    def is_different(self) -> bool:
        lists = (self.added, self.removed, self.reshaped, self.config, self.side_files, self.retyped, self.changed)
        return any(lists)

    def by_kind(self) -> list[tuple[str, int, Sums]]:
        """(kind, tensors, sums) of each kind, and of all kinds last."""
        groups = [(kind, [t.sums for t in self.tensors if t.kind == kind]) for kind in KINDS]
        found = [(kind, len(sums), Sums.total(sums)) for kind, sums in groups if sums]
        return [*found, ("all", len(self.tensors), Sums.total(tensor.sums for tensor in self.tensors))]

    def by_layer(self) -> list[tuple[int, Sums]]:
        layers: dict[int, list[Sums]] = {}
        for tensor in self.tensors:
            if tensor.layer is not None:
                layers.setdefault(tensor.layer, []).append(tensor.sums)
        return [(layer, Sums.total(layers[layer])) for layer in sorted(layers)]


def diff_models(
    a: ModelRef,
    b: ModelRef,
    base: ModelRef | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """Compares two models, and with a base their task vectors too.

    Args:
        threads: that read and compare; all processors by default.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: a model that cannot be opened or read; SourceChanged: one that changes meanwhile.
    """
    models = [open_model(ref) for ref in (a, b, *([base] if base else []))]
    notes: list[str] = []
    first, *others = [_renamed(models[0], model, notes) for model in models]
    second = others[0]
    pairs = [(name, _refs(name, first, others)) for name in first if name in second]
    same = [(name, refs) for name, refs in pairs if refs[0].shape == refs[1].shape]
    if base is not None and (lacking := [name for name, refs in same if len(refs) == 2]):
        notes.append(f"{base.text} lacks {len(lacking)} of the tensors, or has them in other shapes: no task vectors")
    sums = _compare(models, [refs for _, refs in same], threads, progress)
    stack = main_stack(find_stacks(first, models[0].config), models[0].config)
    tensors = []
    for (name, refs), found in zip(same, sums, strict=True):
        place = stack.layer(name) if stack else None
        dtypes = (refs[0].dtype, refs[1].dtype)
        layer = None if place is None else place[0]
        tensors.append(TensorDiff(name, kind_of(name), layer, refs[0].shape, dtypes, found))
    return Diff(
        added=tuple(name for name in second if name not in first),
        removed=tuple(name for name in first if name not in second),
        reshaped=tuple((n, refs[0].shape, refs[1].shape) for n, refs in pairs if refs[0].shape != refs[1].shape),
        tensors=tuple(tensors),
        config=tuple(_config_differences(models[0].config, models[1].config)),
        side_files=tuple(_side_file_differences(models[0], models[1])),
        with_base=base is not None,
        notes=(*notes, *(f"{model.ref.text}: {note}" for model in models for note in model.notes)),
    )


def _renamed(donor: Checkpoint, other: Checkpoint, notes: list[str]) -> Mapping[str, TensorRef]:
    """The other model's tensors under the first one's names, if only a prefix differs."""
    found = map_prefix(list(other.tensors), list(donor.tensors))
    if found is None:
        return other.tensors
    notes.append(f'{other.ref.text}: its names have the prefix "{found[0]}" where {donor.ref.text} has "{found[1]}"')
    return {rename(name, *found, donor.tensors): ref for name, ref in other.tensors.items()}


def _refs(name: str, first: Mapping[str, TensorRef], others: Sequence[Mapping[str, TensorRef]]) -> list[TensorRef]:
    """a, b and the base's, if it has such a tensor and all of them are floats."""
    refs = [first[name], others[0][name]]
    if len(others) > 1 and name in others[1] and others[1][name].shape == refs[0].shape == refs[1].shape:
        refs.append(others[1][name])
    return refs if all(DTYPES[ref.dtype].is_float for ref in refs) else refs[:2]


def _compare(
    models: Sequence[Checkpoint],
    tensors: Sequence[Sequence[TensorRef]],
    threads: int | None,
    progress: Callable[[int, int], None],
) -> list[Sums]:
    """The sums of each tensor; large tensors come first, so that none is left for one thread at the end."""
    crew, buffers = Crew(threads or processors()), Buffers()
    found: list[Sums] = [Sums()] * len(tensors)
    sizes = [sum(ref.nbytes for ref in refs) for refs in tensors]
    finished = [0] * len(tensors)
    with SourceReader([file for model in models for file in model.files]) as reader:

        def compare(place: int) -> None:
            refs = tuple(tensors[place])
            if all(DTYPES[ref.dtype].is_float for ref in refs):
                found[place] = _floats(StepTensor(side_by_side(refs), reader, crew, buffers))
            else:
                found[place] = _integers(refs[0], refs[1], reader)
            reader.release(refs)
            finished[place] = sizes[place]

        order = sorted(range(len(tensors)), key=lambda place: -sizes[place])
        crew.each(compare, order[-1:] + order[:-1], lambda: progress(sum(finished), sum(sizes)), alone=1)
        reader.check_unchanged()
    return found


def side_by_side(refs: tuple[TensorRef, ...]) -> Step:
    """What the engine reads blocks of: tensors of one shape side by side."""
    models = tuple(range(len(refs)))
    return Step(refs[0].name, _cut(refs[0]), refs[0].dtype, "", 0, "passthrough", refs, models)


def _cut(ref: TensorRef) -> tuple[int, ...]:
    """The shape by which a tensor is cut into chunks: rows that are longer than a chunk are cut too."""
    is_long = bool(ref.shape) and ref.shape[-1] > CHUNK and not ref.is_computed
    return (ref.size,) if is_long else ref.shape


def _floats(tensor: StepTensor) -> Sums:
    names = PAIR + TASKS if len(tensor.sources) == 3 else PAIR

    def sums(block: Any) -> tuple[np.ndarray[Any, Any], int]:
        out = np.zeros(len(names))
        return out, difference_of(block.raw, out)

    parts = tensor.map_chunks(sums)
    columns = dict(zip(names, zip(*(out for out, _ in parts), strict=True), strict=True)) if parts else {}
    values: dict[str, Any] = {name: math.fsum(column) for name, column in columns.items() if name != "largest"}
    values |= {name: int(values[name]) for name in ("changed", "both", "agree") if name in values}
    largest = float(max(columns.get("largest", ()), default=0.0))
    return Sums(**values, largest=largest, size=tensor.size, nonfinite=sum(count for _, count in parts))


def _integers(a: TensorRef, b: TensorRef, reader: SourceReader) -> Sums:
    """How many values differ; integers have no other measure."""
    chunks, changed = Chunks.of(_cut(a)), 0
    for chunk in range(chunks.count):
        start, stop = chunks.span(chunk)
        values = []
        for ref in (a, b):
            if DTYPES[ref.dtype].is_float and ref.dtype != "F64":
                values.append(np.empty(stop - start, np.float32))
                reader.read_values(ref, start, values[-1])
            else:
                values.append(np.empty(stop - start, DTYPES[ref.dtype].numpy_name))
                reader.read_into(ref, start, values[-1])
        changed += int(np.count_nonzero(values[0] != values[1]))
    return Sums(size=chunks.size, changed=changed)


def _config_differences(
    a: Mapping[str, object], b: Mapping[str, object], path: str = ""
) -> Iterator[tuple[str, object, object]]:
    for key in dict.fromkeys((*a, *b)):
        ours, theirs = a.get(key), b.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _config_differences(ours, theirs, f"{path}{key}.")
        elif ours != theirs:
            yield f"{path}{key}", ours, theirs


def _side_file_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    ours, theirs = a.side_files(), b.side_files()
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            yield f"{name} (only in {a.ref.text if name in ours else b.ref.text})"
        elif (Path(a.path) / name).read_bytes() != (Path(b.path) / name).read_bytes():
            yield name
