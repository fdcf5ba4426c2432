"""Checks that involve several places of a recipe: models against method, base, required parameters, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge.methods.registry import Method, Parameter
from merge.recipe.build import PASSTHROUGH
from merge.recipe.model import Conditional, ModelRef, Module, Recipe, Setting, Settings, Source
from merge.recipe.reader import UNREADABLE, RecipeReader
from merge.schema.reader import join

AreAdapters = Callable[[Sequence[Source], ModelRef | None], bool]
_VARIES = object()  # a value that is not the same for every tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are merged with each other: all of `models`, or the sources of one slice."""

    path: str  # of the list of sources, "models" or "slices.1.sources"
    what: str  # its name in messages
    sources: tuple[Source, ...]
    base: ModelRef | None
    base_path: str
    outer: tuple[tuple[str, Settings], ...]  # (path, settings) of slice, module and recipe, the innermost first
    method: Method
    method_path: str

    @property
    def is_whole(self) -> bool:
        """Whether these are whole models; then the base may be added."""
        return self.path.rpartition(".")[2] == "models"

    def source_path(self, i: int) -> str:
        return join(self.path, str(i))

    def is_base(self, source: Source) -> bool:
        return self.base is not None and source.model == self.base


def check(reader: RecipeReader, recipe: Recipe, are_adapters: AreAdapters) -> None:
    """Notes the problems that involve several places of the recipe, once its models are located."""
    _one_of_models_and_slices(reader, recipe)
    _upscale(reader, recipe)
    if reader.method is None or reader.broken.intersection(("models", "slices", "modules")):
        return
    for method in reader.in_use:
        if recipe.align is not None and method.statistics is not None:
            message = f'"align" permutes units, so the statistics of {method.name} would not fit; remove "align"'
            reader.problem(reader.line("align"), message)
    _holds_layers(reader, recipe)
    for group in _groups(reader, recipe):
        if group.path in reader.broken or group.path.rpartition(".")[0] in reader.broken:
            continue
        method = group.method
        _base(reader, group, method, are_adapters)
        _count(reader, group, method)
        _required(reader, group, method)
        _statistics(reader, group, method)
        _same_length(reader, group)
        _method_s_own(reader, group, method)


def _groups(reader: RecipeReader, recipe: Recipe) -> Iterator[Group]:
    top = (("parameters", recipe.parameters),)
    yield from _groups_in(reader, recipe, "", recipe, top, (recipe.merge_method, "merge_method"))
    for name, module in recipe.modules.items():
        at = f"modules.{name}"
        method = (recipe.merge_method, "merge_method")
        if module.merge_method is not None:
            method = (module.merge_method, f"{at}.merge_method")
        outer = ((f"{at}.parameters", module.parameters), *top)
        if at not in reader.broken:
            yield from _groups_in(reader, recipe, f"{at}.", module, outer, method)


def _groups_in(
    reader: RecipeReader,
    recipe: Recipe,
    prefix: str,
    part: Recipe | Module,
    outer: tuple[tuple[str, Settings], ...],
    method: tuple[str, str],
) -> Iterator[Group]:
    """The groups of the recipe itself or of a module, without those whose method is unknown."""
    within = f"module {prefix.removeprefix('modules.')[:-1]}, " if prefix else ""
    if part.models and (known := reader.methods.get(method[0])) is not None:
        what = f'{within}"models"'
        yield Group(f"{prefix}models", what, part.models, recipe.base_model, "base_model", outer, known, method[1])
    for i, piece in enumerate(part.slices):
        at = f"{prefix}slices.{i}"
        base, base_path = piece.base_model, f"{at}.base_model"
        if base is None:
            base, base_path = recipe.base_model, "base_model"
        name, named_at = method if piece.merge_method is None else (piece.merge_method, f"{at}.merge_method")
        levels = ((f"{at}.parameters", piece.parameters), *outer)
        if (known := reader.methods.get(name)) is not None and f"{at}.merge_method" not in reader.broken:
            what = f"{within}slice {i + 1}"
            yield Group(f"{at}.sources", what, piece.sources, base, base_path, levels, known, named_at)


def _upscale(reader: RecipeReader, recipe: Recipe) -> None:
    if recipe.upscale is None:
        return
    line = reader.line("upscale")
    if reader.method is not None and reader.method.name != PASSTHROUGH:
        message = f'"upscale" copies layers: its merge_method is {PASSTHROUGH}, not {reader.method.name}'
        reader.problem(line, message)
    if recipe.slices or recipe.modules:
        reader.problem(line, '"upscale" makes the slices itself: list its only model under "models"')


def _one_of_models_and_slices(reader: RecipeReader, recipe: Recipe) -> None:
    parts = (("models", recipe.models), ("slices", recipe.slices), ("modules", recipe.modules))
    given = [key for key, value in parts if value or key in reader.broken]
    if len(given) > 1:
        both = " and ".join(f'"{key}"' for key in given)
        reader.problem(reader.line(given[1]), f"{both} are both given; a recipe has one of them")
    elif not given:
        line = next((reader.lines[key] for key, _ in parts if key in reader.lines), 1)
        reader.problem(line, 'the recipe has no models: list them under "models", or layers of them under "slices"')
    for name, module in recipe.modules.items():
        at = f"modules.{name}"
        known = [key for key in ("models", "slices") if getattr(module, key) or join(at, key) in reader.broken]
        if len(known) != 1 and at not in reader.broken:
            found = "both" if known else "neither"
            reader.problem(reader.line(at), f'module "{name}" needs either "models" or "slices", and has {found}')


def _base(reader: RecipeReader, group: Group, method: Method, are_adapters: AreAdapters) -> None:
    n_bases = sum(group.is_base(source) for source in group.sources)
    line = reader.line(group.path)
    if group.base == UNREADABLE:
        return
    if method.base == "none":
        # The recipe's base may be meant for other slices; with modules it names the model to complete.
        own = group.path == "models" or group.base_path != "base_model"
        # In mergekit such a base provides config.json and tokenizer, as it does here for stacked slices.
        if group.base is not None and not n_bases and own and reader.compat is None:
            message = f'{method.name} has no base model; remove "base_model", or list "{group.base.text}" as a model'
            reader.problem(reader.line(group.base_path), message)
        return
    if method.base != "required" and (group.base is None or not method.base_apart):
        return
    if group.base is None and method.base_apart and are_adapters(group.sources, None):
        return  # their changes are task vectors already
    if group.base is None:
        meaning = "the model at the t = 0 end" if method.base_is_input else "the model the others were fine-tuned from"
        reader.problem(reader.line(group.method_path), f'{method.name} needs "base_model", {meaning}')
    elif not n_bases and not group.is_whole:
        message = f'{group.what}: {method.name} needs its base_model "{group.base.text}" among the sources'
        reader.problem(line, message)
    elif n_bases > 1:
        message = f'{group.what}: base_model "{group.base.text}" is listed {n_bases} times; list it once'
        reader.problem(line, message)


def _inputs(group: Group, method: Method) -> list[tuple[int, Source]]:
    """The sources that count as inputs: not the base, unless the method takes it as one."""
    apart = method.base_apart
    return [(i, source) for i, source in enumerate(group.sources) if not (apart and group.is_base(source))]


def _count(reader: RecipeReader, group: Group, method: Method) -> None:
    fewest, most = method.n_models
    n = len(_inputs(group, method))
    if fewest <= n <= most:
        return
    if UNREADABLE in (source.model for source in group.sources) or group.base == UNREADABLE:
        return  # the base among them is unknown
    takes = f"at least {fewest}" if n < fewest else f"at most {most}"
    takes = f"exactly {fewest}" if fewest == most else takes
    besides = " besides the base" if method.base_apart and (method.base == "required" or group.base) else ""
    models = "model" if takes.endswith(" 1") else "models"
    listed = f"{n} is listed" if n == 1 else f"{n} are listed"
    message = f"{group.what}: {method.name} merges {takes} {models}{besides}, and {listed}"
    if group.base is not None and group.source_path(len(group.sources) - 1) not in reader.lines:
        message += f' with base_model "{group.base.text}", which must be one of them'
    elif fewest == most == 1 and group.is_whole:
        message += '; to stack layers, use "slices"'
    reader.problem(reader.line(group.path), message)


def _required(reader: RecipeReader, group: Group, method: Method) -> None:
    for parameter in method.parameters:
        if not parameter.required or any(_written(reader, path, settings, parameter) for path, settings in group.outer):
            continue
        if not parameter.per_model:
            message = f'{method.name} needs the parameter "{parameter.name}": write it under "parameters"'
            at = "parameters" if "parameters" in reader.lines else group.method_path
            reader.problem(reader.line(at), message)
            continue
        for i, source in _inputs(group, method):
            path = group.source_path(i)
            # Reported already, at its line.
            misplaced = reader.compat is None and join(path, parameter.name) in reader.lines
            if (
                path in reader.broken
                or misplaced
                or _written(reader, f"{path}.parameters", source.parameters, parameter)
            ):
                continue
            message = f'{method.name} needs the parameter "{parameter.name}" for model "{source.model.text}"'
            if path not in reader.lines:
                message += ": base_model is an input of this method, so list it under models with its parameters"
            reader.problem(source.line, message)


def _written(reader: RecipeReader, path: str, settings: Settings, parameter: Parameter) -> bool:
    """Whether a level has the parameter, valid or not; an invalid one was reported."""
    key = join(path, parameter.name)
    return parameter.name in settings or path in reader.broken or key in reader.broken or key in reader.lines


def _statistics(reader: RecipeReader, group: Group, method: Method) -> None:
    """Every input of a method that needs statistics must have them, and no other may."""
    for i, source in _inputs(group, method):
        path = group.source_path(i)
        if path in reader.broken or join(path, "statistics") in reader.broken:
            continue
        if method.statistics is None and source.statistics is not None:
            message = f'{method.name} uses no statistics; remove "statistics" of model "{source.model.text}"'
            reader.problem(reader.line(join(path, "statistics")), message)
        elif method.statistics is not None and source.statistics is None:
            reader.problem(
                source.line,
                f'{method.name} needs "statistics" for model "{source.model.text}": the file that '
                f"`merge statistics MODEL --kind {method.statistics}` writes",
            )


def _same_length(reader: RecipeReader, group: Group) -> None:
    """Checks that the sources of a slice have equally many layers, which are merged one by one."""
    lengths = [source.layer_range[1] - source.layer_range[0] for source in group.sources if source.layer_range]
    if any(length != lengths[0] for length in lengths):
        listed = " and ".join(str(length) for length in lengths)
        reader.problem(reader.line(group.path), f"{group.what}: its sources have different numbers of layers: {listed}")


def _holds_layers(reader: RecipeReader, recipe: Recipe) -> None:
    """Checks that not all slices are empty; one [n, n] may give only tensors before or after the layers."""
    parts: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    for part in parts:
        sources = [source for piece in part.slices for source in piece.sources]
        if sources and all(source.layer_range and len(range(*source.layer_range)) == 0 for source in sources):
            ranges = " and ".join(str(list(source.layer_range)) for source in sources if source.layer_range)
            reader.problem(sources[0].line, f'no slice holds a layer: "layer_range" is {ranges}')


def _method_s_own(reader: RecipeReader, group: Group, method: Method) -> None:
    """The method's own check (weights that sum to zero ...), where its parameters are the same for every tensor."""
    if method.check is None:
        return
    outer = list(group.outer)
    resolved: dict[str, Any] = {}
    for parameter in method.parameters:
        if not parameter.per_model:
            resolved[parameter.name] = _resolved(reader, outer, parameter)
            continue
        sources = _inputs(group, method)
        levels = [[(f"{group.source_path(i)}.parameters", source.parameters), *outer] for i, source in sources]
        resolved[parameter.name] = tuple(_resolved(reader, level, parameter) for level in levels)
    values = [item for value in resolved.values() for item in (value if isinstance(value, tuple) else (value,))]
    wrong = None if _VARIES in values else method.check(resolved)
    if wrong is not None:
        reader.problem(reader.line(group.path), f"{group.what}: {wrong}")


def _resolved(reader: RecipeReader, levels: list[tuple[str, Settings]], parameter: Parameter) -> object:
    """The value for all tensors; _VARIES if it differs between them or is known to be wrong."""
    for path, settings in levels:
        if parameter.name in settings:
            return _constant(settings[parameter.name])
        if _written(reader, path, settings, parameter):
            return _VARIES
    return _VARIES if parameter.required else parameter.default


def _constant(setting: Setting) -> object:
    if not isinstance(setting, tuple):
        return setting
    first = setting[0]
    if isinstance(first, Conditional):
        return _constant(first.value) if first.filter in (None, "*") else _VARIES
    return first if all(point == first for point in setting) else _VARIES


def check_attention(reader: RecipeReader, recipe: Recipe) -> None:
    """Checks that the method for everything but the experts takes this many models."""
    method = reader.methods.get(recipe.merge_method)
    if recipe.mixture is None or method is None or method.name == PASSTHROUGH:
        return
    experts = recipe.models[: len(recipe.mixture.experts)]
    fewest, most = method.n_models
    n = sum(not method.base_apart or source.model != recipe.base_model for source in experts)
    if not fewest <= n <= most:
        takes = f"exactly {fewest}" if fewest == most else f"at least {fewest}" if n < fewest else f"at most {most}"
        besides = " besides the base" if method.base_apart else ""
        reader.problem(
            reader.line("attention"),
            f"{method.name} merges {takes} models{besides}, and the recipe lists {n} as experts",
        )
