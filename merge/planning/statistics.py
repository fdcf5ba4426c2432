"""Opens the statistics files of a recipe, and finds the tensor for each input of a step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from merge.checkpoint.safetensors_file import read_header
from merge.errors import CheckpointError, Problem
from merge.methods import get_method
from merge.methods.registry import StatisticsKind
from merge.plan import SourceFile, TensorRef
from merge.planned import Planned
from merge.recipe.model import Module, Recipe, Source

_OTHER_MODEL = "Were they made of another model?"


class Statistics:
    """Opens the headers of all files; `problems`: files that cannot be used, each once."""

    def __init__(self, recipe: Recipe, kind: StatisticsKind) -> None:
        self._kind = kind
        self.problems: list[Problem] = []
        self._tensors: dict[str, dict[str, TensorRef]] = {}
        self._files: dict[str, SourceFile] = {}
        for source in _sources_of(recipe, kind):
            if source.statistics is not None and source.statistics not in self._tensors:
                where = f"{recipe.file}:{source.line}" if recipe.file else source.model.text
                self._open(source.statistics, where)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return tuple(self._files.values())

    def _open(self, path: str, where: str) -> None:
        self._tensors[path] = {}
        make = f"Make it with `merge statistics MODEL --kind {self._kind}`."
        if not os.path.isfile(path):
            self.problems.append(Problem(f"there is no statistics file {path}.", where, make))
            return
        try:
            file = SourceFile.now(path)
            refs, _ = read_header(path)
        except CheckpointError as error:
            self.problems.append(Problem(str(error), where))
            return
        prefix = f"{self._kind}."
        self._tensors[path] = {ref.name.removeprefix(prefix): ref for ref in refs if ref.name.startswith(prefix)}
        self._files[path] = file
        if not self._tensors[path]:
            kinds = dict.fromkeys(ref.name.partition(".")[0] for ref in refs)
            found = f"has {', '.join(list(kinds)[:3])}" if kinds else "is empty"
            self.problems.append(Problem(f"{path} {found}, and {self._kind} is needed.", where, make))

    def of(self, name: str, owners: Sequence[tuple[str | None, str, TensorRef]]) -> Planned[tuple[TensorRef, ...]]:
        """The statistics of one step; () if this tensor has none, or a problem was found.

        Args:
            name: of the output tensor.
            owners: (statistics file, model's name, stored tensor) of each input.
        """
        files = [self._tensors.get(path or "", {}) for path, _, _ in owners]
        if not all(files):
            return Planned(())
        found = [tensors.get(ref.name) for tensors, (_, _, ref) in zip(files, owners, strict=True)]
        if not any(found) and self._kind == "gram":
            return Planned(())  # not the weight of a linear layer
        lacking = [model for statistics, (_, model, _) in zip(found, owners, strict=True) if statistics is None]
        if lacking:
            message = f"the statistics of {', '.join(lacking)} have no {self._kind} of it."
            return Planned((), (Problem(message, name, _OTHER_MODEL),))
        refs = tuple(statistics for statistics in found if statistics is not None)
        problems = []
        for statistics, (_, model, ref) in zip(refs, owners, strict=True):
            expected = ref.shape if self._kind == "fisher" else (ref.shape[-1:] * 2)
            if statistics.shape != expected or statistics.dtype != "F32":
                message = (
                    f"the {self._kind} of {model} is {statistics.dtype} {list(statistics.shape)}, "
                    f"and F32 {list(expected)} is needed for a weight of shape {list(ref.shape)}."
                )
                problems.append(Problem(message, name, _OTHER_MODEL))
        return Planned(() if problems else refs, tuple(problems))


def _sources_of(recipe: Recipe, kind: StatisticsKind) -> Iterator[Source]:
    """The recipe's sources whose method needs this kind."""
    parts: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    for part in parts:
        method = part.merge_method or recipe.merge_method
        if _kind_of(method) == kind:
            yield from part.models
        for piece in part.slices:
            if _kind_of(piece.merge_method or method) == kind:
                yield from piece.sources


def _kind_of(name: str) -> StatisticsKind | None:
    method = get_method(name)
    return None if method is None else method.statistics
