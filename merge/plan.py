"""The Plan: everything a run will do, as frozen plain data that survives JSON.

A Plan is made from the recipe, config files and tensor headers only; no tensor byte is read. Each Step says
which source tensors go through which operation into which output tensor, at which byte of which file.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from merge.dtypes import DTYPES

COPY = "copy"  # stands for the method of a step that copies bytes
Kind = Literal["copy", "merge", "factor"]


class TensorRef:
    """Where the numbers of one tensor come from: Stored or Derived.

    Attributes:
        name: the tensor's name in its file; of a derived one, what messages call it.
        dtype: safetensors name, e.g. "BF16". Of a source that is not exact: what an output gets that keeps its input's.
        shape: sizes; () for a scalar.
        file: absolute path of the (first) file that it is read from; "" if there is none.
        is_exact: elements are read as they are stored, in `dtype`; else as float32 values.
        is_computed: no model stores this tensor.
    """

    __slots__ = ()
    name: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def variant(data: Mapping[str, object]) -> type[TensorRef]:
        """Which of the two this is in JSON."""
        return Derived if "operation" in data else Stored

    if TYPE_CHECKING:  # a property here would be the field's default in Stored

        @property
        def file(self) -> str: ...

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for all of it."""
        raise NotImplementedError

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def is_computed(self) -> bool:
        return False

    def named(self, name: str) -> TensorRef:
        """The same tensor under another name."""
        return dataclasses.replace(self, name=name)  # type: ignore[type-var]

    def copies_to(self, dtype: str) -> bool:
        """Whether its elements are those of an output tensor of this dtype."""
        return self.is_exact and self.dtype == dtype


@dataclass(frozen=True, slots=True)
class Stored(TensorRef):
    """Elements that lie one after another in a file, from byte `offset` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Derived(TensorRef):
    """Computed while it is read; see merge.sources.

    Attributes:
        operation: name of the operation, inputs: what it takes.
        parameters: what JSON can hold: numbers, texts, booleans, None, and tuples of them.
        how: rearranged: elements as they are stored, in other places; decoded: one model's own tensor, of another form
            of storage; computed: anything else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    inputs: tuple[TensorRef, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    how: Literal["rearranged", "decoded", "computed"] = "computed"

    @property
    def file(self) -> str:
        return next((ref.file for ref in self.inputs if ref.file), "")

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.inputs)

    @property
    def is_exact(self) -> bool:
        return self.how == "rearranged"

    @property
    def is_computed(self) -> bool:
        return self.how == "computed"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is read; the run fails if it does not stay as it was when its header was read.

    `cp -p`, `rsync -a` and `tar` give a file another's mtime. Its ctime, which no program can set, and its inode still
    tell the two apart.

    Attributes:
        size: bytes.
        device, inode: where the file system keeps it.
        made_from: of a file that this run makes itself, a digest of what it makes it from; its times then mean nothing.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    made_from: str = ""

    @staticmethod
    def now(path: str | os.PathLike[str], made_from: str = "") -> SourceFile:
        """The file as it is. Raises OSError."""
        return SourceFile.of(os.fspath(path), os.stat(path), made_from)

    @staticmethod
    def of(path: str, info: os.stat_result, made_from: str = "") -> SourceFile:
        return SourceFile(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_dev, info.st_ino, made_from)

    @property
    def stamp(self) -> tuple[int, ...]:
        """Differs between two files, and between a file and what it was before it was written to."""
        return self.size, self.mtime_ns, self.ctime_ns, self.device, self.inode


@dataclass(frozen=True, slots=True)
class SourceModel:
    """An input model: how the recipe names it, where it was found, and the weight files it is read from."""

    ref: str
    path: str
    revision: str | None
    files: tuple[SourceFile, ...]


class Finding:
    """Something that a run finds out before its first step, from tensors, and keeps over a kill; see merge.findings.

    Attributes:
        finder: its kind, and the file of merge/findings that has its class.
        key: names it among the findings of a plan.
        bytes_read: of tensors.
        what: why a plan that has it cannot be carried out block by block.
    """

    __slots__ = ()
    finder: str
    key: str

    @staticmethod
    def variant(data: Mapping[str, object]) -> type[Finding]:
        """Its class, from JSON."""
        return typing.cast(type[Finding], importlib.import_module(f"merge.findings.{data['finder']}").FINDING)

    @property
    def bytes_read(self) -> int:
        raise NotImplementedError

    @property
    def what(self) -> str:
        raise NotImplementedError

    def held_bytes(self, threads: int) -> int:
        """Bytes that finding it takes."""
        raise NotImplementedError

    @classmethod
    def summary(cls, plan: Plan, notes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What report and manifest say of all findings of this kind; `notes`: what the journal keeps, by key."""
        return []


@dataclass(frozen=True, slots=True)
class Experts:
    """What the mixture of experts is that a plan makes; `active`: parameters that one token uses."""

    layout: str
    n_experts: int
    n_shared: int
    per_token: int
    n_layers: int
    active: int


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor.

    Attributes:
        name, shape, dtype: of the output tensor; file, offset: the shard's name and the byte where it begins.
        method: name of the merge method; COPY means that the bytes of the only input pass through unchanged.
        inputs: the tensors that are combined, in the recipe's order, without the base.
        models: for each input, the index of its model in Plan.models.
        base: the base's tensor and base_model its model's index, for methods that have a base.
        parameters: resolved numbers; a per-model parameter is a tuple with one value for each input.
        statistics: for methods that need them, one tensor of a statistics file for each input; () where none has one.
        factor: "A" or "B" where the tensor is that factor of a combined adapter: inputs are then the changes that the
            adapters make to one matrix, each the product of its own factors (merge/sources/low_rank.py).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    method: str
    inputs: tuple[TensorRef, ...]
    models: tuple[int, ...]
    base: TensorRef | None = None
    base_model: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    statistics: tuple[TensorRef, ...] = ()
    factor: str = ""

    def at(self, file: str, offset: int) -> Step:
        """The same step, its tensor at another place."""  # a fifth of what dataclasses.replace takes
        return Step(
            *(self.name, self.shape, self.dtype, file, offset, self.method, self.inputs, self.models, self.base),
            *(self.base_model, self.parameters, self.statistics, self.factor),
        )

    @property
    def kind(self) -> Kind:
        """copy: bytes pass through; factor: see `factor`; merge: anything else. Each has an executor."""
        return "factor" if self.factor else "copy" if self.method == COPY else "merge"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def bytes_read(self) -> int:
        return sum(ref.nbytes for ref in (*self.sources, *self.statistics))

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """The tensors that are read: the base first, where there is one, then the inputs."""
        return self.inputs if self.base is None else (self.base, *self.inputs)


@dataclass(frozen=True, slots=True)
class Shard:
    """An output file: its name, its JSON header's text (padded) and its whole size in bytes."""

    file: str
    header: str
    size: int


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small output file: a byte-for-byte copy of `source`, or `text` when there is no source.

    Attributes:
        state: of the source when the plan was made.
    """

    name: str
    source: str | None = None
    text: str | None = None
    state: SourceFile | None = None

    @staticmethod
    def copy(name: str, source: str) -> SideFile:
        """Raises OSError if the source is gone."""
        return SideFile(name, source, state=SourceFile.now(source))


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """All of a run.

    `notes` are things worth saying that are not errors (prefix maps, ties, leniencies used). `method_origin` is empty
    for this package's methods; else it names the method's package or file, with version or digest. `method` is the
    recipe's own; slices may have others, and `other_origins` says where those come from. `stages` are the
    earlier merges of a pipeline that this one is made from, without their files; those that were written to the disk
    first have no steps here, the others are computed while this one reads them. `notes_rounding`: the
    manifest says of every tensor what rounding to its dtype changed. `tokenizers_held`, `tokenizers_peak`: bytes that
    the tokenizers take which were read for the plan, from then on and while it was made.
    """

    name: str
    method: str
    seed: int
    models: tuple[SourceModel, ...]
    base_model: int | None
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...]
    allow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recipe_text: str = ""
    statistics_files: tuple[SourceFile, ...] = ()
    method_origin: str = ""
    findings: tuple[Finding, ...] = ()
    other_origins: dict[str, str] = field(default_factory=dict)
    stages: tuple[Plan, ...] = ()
    notes_rounding: bool = False
    experts: Experts | None = None
    compat: str | None = None
    tokenizers_held: int = 0
    tokenizers_peak: int = 0

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for step in self.steps) + sum(finding.bytes_read for finding in self.findings)

    @property
    def n_parameters(self) -> int:
        return sum(step.size for step in self.steps)

    def __repr__(self) -> str:
        from merge import plan_summary as summary

        return summary.line(self)

    def _repr_html_(self) -> str:
        from merge import plan_summary as summary

        return summary.table(self)

    def to_json(self) -> str:
        from merge.codec import encode

        return json.dumps(encode(self), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        from merge.codec import decode

        return decode(json.loads(text), Plan)
