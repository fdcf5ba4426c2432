"""The picture of a stack in `merge plan`: output layers against the source layers they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING

from merge.jsontext import parse_json
from merge.show.terminal import printable

if TYPE_CHECKING:
    from merge.architecture import Stack
    from merge.plan import Plan, Step

_MOST_ROWS = 40
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_SEVERAL = "#"  # layers of several models in one place

Sources = tuple[tuple[int, int], ...]  # (model, its layer) of everything that a layer is made of


@dataclass
class LayerRun:
    """A run of output layers made in the same way, each from the source layers that follow the previous ones."""

    first: int
    last: int
    sources: Sources  # of the first layer
    method: str

    @property
    def n(self) -> int:
        return self.last - self.first + 1


def pictures(plan: Plan, width: int) -> Iterator[object]:
    """Lines for each stack whose layers are not those of its sources in their order."""
    for prefix, runs in rearranged(plan):
        yield from _picture(plan, prefix, runs, width)


def rearranged(plan: Plan) -> Iterator[tuple[str, list[LayerRun]]]:
    """(prefix, runs) of each rebuilt stack."""
    from merge.architecture import find_stacks

    config = next((side.text for side in plan.side_files if side.name == "config.json" and side.text), "{}")
    for stack in find_stacks((step.name for step in plan.steps), parse_json(config)):
        runs = stack_runs(plan, stack)
        if len(runs) > 1 or any(layer != runs[0].first for _, layer in runs[0].sources):
            yield stack.prefix, runs


def stack_runs(plan: Plan, stack: Stack) -> list[LayerRun]:
    layers: dict[int, list[Step]] = {}
    for step in plan.steps:
        if (place := stack.layer(step.name)) is not None:
            layers.setdefault(place[0], []).append(step)
    runs: list[LayerRun] = []
    for layer in sorted(layers):
        sources, method = _sources(layers[layer]), _method(layers[layer])
        last = runs[-1] if runs else None
        if last is not None and last.method == method and _moved(last.sources, last.n) == sources:
            last.last = layer
        else:
            runs.append(LayerRun(layer, layer, sources, method))
    return runs


def _sources(steps: list[Step]) -> Sources:
    found: dict[tuple[int, int], None] = {}
    for step in steps:
        for model, ref in zip(step.models, step.inputs, strict=True):
            number = next((part for part in ref.name.split(".") if part.isdecimal()), None)
            if number is not None:
                found[model, int(number)] = None
    return tuple(found)


def _moved(sources: Sources, by: int) -> Sources:
    return tuple((model, layer + by) for model, layer in sources)


def _method(steps: list[Step]) -> str:
    """The methods of a layer, without copied norms beside merged matrices."""
    methods = dict.fromkeys(step.method for step in steps)
    return " ".join(method for method in methods if method != "copy") or "copy"


def _picture(plan: Plan, prefix: str, runs: list[LayerRun], width: int) -> Iterator[object]:
    from rich.text import Text

    models = list(dict.fromkeys(model for run in runs for model, _ in run.sources))
    letters = {model: ascii_uppercase[i % len(ascii_uppercase)] for i, model in enumerate(models)}
    styles = {letter: _COLOURS[i % len(_COLOURS)] for i, letter in enumerate(letters.values())}
    n_sources = max(layer + run.n for run in runs for _, layer in run.sources)
    n_columns = max(8, width - 32) if n_sources > width - 32 else n_sources
    yield Text(f"stack    {runs[-1].last + 1} layers at {prefix}*, by source layers 0 to {n_sources - 1}:")
    for run in _few(runs):
        if run is None:
            yield Text("     ...")
            continue
        cells = [" "] * n_columns
        for model, first in run.sources:
            for layer in range(first, first + run.n):
                column = layer * n_columns // n_sources
                taken = cells[column] not in (" ", letters[model])
                cells[column] = _SEVERAL if taken else letters[model]
        line = Text(f"{_span(run.first, run.last):>9}  ")
        for cell in cells:
            line.append(cell, styles.get(cell))
        line.append(f"  {_said(run, letters)}")
        line.rstrip()
        yield line
    for model, letter in letters.items():
        yield Text.assemble("         ", (letter, styles[letter]), f"  {printable(plan.models[model].ref)}")
    if any(len({model for model, _ in run.sources}) > 1 for run in runs):
        yield Text(f"         {_SEVERAL}  several of them")


def _few(runs: list[LayerRun]) -> Iterator[LayerRun | None]:
    """All of them, or the first and the last ones with None between."""
    if len(runs) <= _MOST_ROWS:
        yield from runs
        return
    yield from runs[: _MOST_ROWS // 2]
    yield None
    yield from runs[-_MOST_ROWS // 2 :]


def _said(run: LayerRun, letters: dict[int, str]) -> str:
    """`A 8-23`, `linear A 8-23 + B 0-15`"""
    made = " + ".join(f"{letters[model]} {_span(first, first + run.n - 1)}" for model, first in run.sources)
    return made if run.method == "copy" else f"{run.method} {made}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
