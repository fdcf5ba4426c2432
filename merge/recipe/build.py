"""The tree of a recipe -> Recipe: one function a level of the schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from merge.dtypes import RECIPE_NAMES
from merge.recipe import names
from merge.recipe.document import line_of
from merge.recipe.model import ALIGN, ALLOW, ModelRef, Module, Recipe, Slice, Source
from merge.recipe.reader import UNREADABLE, Reader, as_integer, join, shown
from merge.recipe.settings import read_settings

MAX_SEED = (1 << 64) - 1


def build(reader: Reader, root: yaml.MappingNode, text: str) -> Recipe:
    """Reads every level; what is wrong goes to the reader, and the rest of the recipe is still built."""
    # The method comes first: it decides what is known and where, whatever the order of the keys.
    named = [value.value for key, value in root.value if key.value == "merge_method" and isinstance(value.value, str)]
    reader.method = reader.methods.get(named[0]) if named else None
    fields = reader.mapping(root, "", "recipe")
    merge_method = _method(reader, root, fields.get("merge_method"))
    base = reader.reference(fields.get("base_model"), "base_model")
    models = _with_base(reader, _models(reader, fields.get("models"), "models"), base)
    slices = _slices(reader, fields.get("slices"), "slices")
    tokenizer = _tokenizer(reader, fields.get("tokenizer"))
    return Recipe(
        merge_method=merge_method,
        models=models,
        slices=slices,
        modules=_modules(reader, fields.get("modules")),
        base_model=base,
        parameters=read_settings(reader, fields.get("parameters"), "parameters", "shared"),
        dtype=read_dtype(reader, fields.get("dtype"), "dtype"),
        out_dtype=read_dtype(reader, fields.get("out_dtype"), "out_dtype"),
        tokenizer_source=_tokenizer_source(reader, fields, _listed(base, models, slices)),
        tokenizer=tokenizer,
        chat_template=reader.text(fields.get("chat_template"), "chat_template"),
        name=read_name(reader, fields.get("name")),
        seed=reader.integer(fields.get("seed"), "seed", '"seed"', 0, MAX_SEED) or 0,
        allow=read_allow(reader, fields.get("allow")),
        align=_align(reader, fields.get("align")),
        text=text,
        file=reader.file,
        lines=reader.lines,
    )


def _method(reader: Reader, root: yaml.Node, node: yaml.Node | None) -> str:
    if node is None:
        at = reader.lines.get("merge_method", line_of(root))
        reader.problem(at, f'"merge_method" is missing; known methods: {", ".join(reader.methods)}')
        return ""
    name = reader.text(node, "merge_method") or ""
    if name and reader.method is None:
        reader.problem(node, names.unknown_method(name, reader.methods))
    return name


def _models(reader: Reader, node: yaml.Node | None, path: str) -> tuple[Source, ...]:
    items = reader.items(node, path, "models")
    return tuple(_source(reader, item, join(path, str(i)), "model") for i, item in enumerate(items))


def _source(reader: Reader, node: yaml.Node, path: str, level: str) -> Source:
    """An entry of `models` or of `sources`; the latter has a layer_range."""
    if isinstance(node, yaml.ScalarNode):
        message = f'{names.LEVELS[level]} must be a mapping, not {shown(node)}; write "- model: {node.value}"'
        reader.problem(node, message, path)
        return Source(UNREADABLE, line=line_of(node))
    fields = reader.mapping(node, path, level)
    if "model" not in fields and path not in reader.broken:
        reader.problem(node, f'{names.LEVELS[level]} needs the key "model"', path)
    layer_range = None
    if level == "source":
        layer_range = _layer_range(reader, node, fields.get("layer_range"), path)
    return Source(
        model=reader.reference(fields.get("model"), join(path, "model")) or UNREADABLE,
        layer_range=layer_range,
        parameters=read_settings(reader, fields.get("parameters"), join(path, "parameters"), "model"),
        line=line_of(node),
        statistics=_statistics(reader, fields.get("statistics"), join(path, "statistics")),
    )


def _statistics(reader: Reader, node: yaml.Node | None, path: str) -> str | None:
    """The file of a source's statistics: as a model's directory, looked for here and then beside the recipe."""
    text = reader.text(node, path)
    if node is None or text is None:
        if node is not None:
            reader.broken.add(path)
        return None
    expanded = os.path.expanduser(text)
    beside = os.path.join(reader.folder or "", expanded)
    return os.path.abspath(beside if os.path.isfile(beside) and not os.path.isfile(expanded) else expanded)


def _layer_range(reader: Reader, around: yaml.Node, node: yaml.Node | None, source_path: str) -> tuple[int, int] | None:
    path = join(source_path, "layer_range")
    if node is None:
        if source_path not in reader.broken:
            reader.problem(around, 'an entry of "sources" needs the key "layer_range", for example [0, 24]', path)
        return None
    ends = [as_integer(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else []
    start, end = ends if len(ends) == 2 else (None, None)
    if start is None or end is None:
        message = f'"layer_range" must be two whole numbers, [first, end), not {_range_shown(node)}'
        reader.problem(node, message, path)
        return None
    if start < 0:
        reader.problem(node, f'"layer_range" [{start}, {end}] begins below 0', path)
        return None
    if end <= start:
        message = f'"layer_range" [{start}, {end}] holds no layer; the end is not included and must be larger'
        reader.problem(node, message, path)
        return None
    return start, end


def _range_shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode) and len(node.value) <= 8:
        return "[" + ", ".join(shown(item) for item in node.value) + "]"
    return shown(node)


def _with_base(reader: Reader, models: tuple[Source, ...], base: ModelRef | None) -> tuple[Source, ...]:
    """`models` and the base, where the base is an input of the method and is not listed (as mergekit has it)."""
    method = reader.method
    if not models or base is None or method is None or not method.base_is_input:
        return models
    if any(source.model == base for source in models):
        return models
    return (*models, Source(base, line=reader.line("base_model")))


def _slices(reader: Reader, node: yaml.Node | None, path: str) -> tuple[Slice, ...]:
    items = reader.items(node, path, "slices")
    return tuple(_slice(reader, item, join(path, str(i))) for i, item in enumerate(items))


def _slice(reader: Reader, node: yaml.Node, path: str) -> Slice:
    fields = reader.mapping(node, path, "slice")
    sources_path = join(path, "sources")
    sources = reader.items(fields.get("sources"), sources_path, "sources")
    if not sources and path not in reader.broken and sources_path not in reader.broken:
        reader.problem(node, 'an entry of "slices" needs "sources", a list of {model, layer_range}', sources_path)
    return Slice(
        sources=tuple(_source(reader, item, join(sources_path, str(i)), "source") for i, item in enumerate(sources)),
        base_model=reader.reference(fields.get("base_model"), join(path, "base_model")),
        parameters=read_settings(reader, fields.get("parameters"), join(path, "parameters"), "shared"),
        line=line_of(node),
    )


def _modules(reader: Reader, node: yaml.Node | None) -> Mapping[str, Module]:
    modules = {}
    for name, _, value in reader.pairs(node, "modules", '"modules"') if node is not None else ():
        path = join("modules", name)
        fields = reader.mapping(value, path, "module")
        modules[name] = Module(
            slices=_slices(reader, fields.get("slices"), join(path, "slices")),
            models=_models(reader, fields.get("models"), join(path, "models")),
            parameters=read_settings(reader, fields.get("parameters"), join(path, "parameters"), "shared"),
        )
    return modules


def read_dtype(reader: Reader, node: yaml.Node | None, path: str) -> str | None:
    """Any name torch or people use -> the safetensors name."""
    text = reader.text(node, path)
    if node is None or text is None:
        return None
    found = RECIPE_NAMES.get(text.removeprefix("torch."))
    if found is None:
        reader.problem(node, f'unknown {path} "{text}"; {names.suggest(text, list(RECIPE_NAMES))}', path)
    return found


def _tokenizer_source(reader: Reader, fields: Mapping[str, yaml.Node], listed: tuple[ModelRef, ...]) -> str | None:
    """ "base", "union" or a model's text, from either spelling; a listed model under the text it is listed by."""
    node, path = fields.get("tokenizer_source"), "tokenizer_source"
    if "tokenizer" in fields:
        if node is not None:
            reader.problem(node, '"tokenizer_source" and "tokenizer" say the same thing; keep one of them')
        values = {key: value for key, _, value in _plain_pairs(fields["tokenizer"])}
        node, path = values.get("source"), "tokenizer.source"
        if node is None:
            return "union"  # mergekit's default for a `tokenizer` without a source
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode) and node.value in ("base", "union"):
        return str(node.value)
    model = reader.reference(node, path)
    return next((other.text for other in listed if other == model), model.text if model else None)


def _listed(base: ModelRef | None, models: tuple[Source, ...], slices: tuple[Slice, ...]) -> tuple[ModelRef, ...]:
    sources = (*models, *(source for piece in slices for source in piece.sources))
    bases = (base, *(piece.base_model for piece in slices))
    return tuple(model for model in (*bases, *(source.model for source in sources)) if model is not None)


def _tokenizer(reader: Reader, node: yaml.Node | None) -> Mapping[str, Any] | None:
    if node is None:
        return None
    fields = reader.mapping(node, "tokenizer", "tokenizer")
    return {key: _plain(value) for key, value in fields.items()}


def _plain(node: yaml.Node) -> Any:
    """Texts, lists and dicts; nothing reads them yet but the refusal."""
    if isinstance(node, yaml.MappingNode):
        return {key: _plain(value) for key, _, value in _plain_pairs(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return node.value


def _plain_pairs(node: yaml.Node) -> list[tuple[str, yaml.Node, yaml.Node]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key.value, key, value) for key, value in pairs if isinstance(key, yaml.ScalarNode)]


def read_name(reader: Reader, node: yaml.Node | None) -> str | None:
    """The default output directory is ./merged/NAME, so a name is one path component."""
    text = reader.text(node, "name")
    if node is None or text is None:
        return None
    if text in (".", "..") or "/" in text or "\\" in text or not text.isprintable():
        reader.problem(node, f'"name" must be usable as the name of a directory, not {shown(node)}', "name")
    return text


def _align(reader: Reader, node: yaml.Node | None) -> str | None:
    text = reader.text(node, "align")
    if node is not None and text is not None and text not in ALIGN:
        reader.problem(node, f'unknown way to align "{text}"; {names.suggest(text, ALIGN)}', "align")
    return text


def read_allow(reader: Reader, node: yaml.Node | None) -> tuple[str, ...]:
    if isinstance(node, yaml.ScalarNode):
        reader.problem(node, f'"allow" must be a list, for example [{next(iter(ALLOW))}], not {shown(node)}')
        return ()
    found: list[str] = []
    for i, item in enumerate(reader.items(node, "allow", "allow")):
        text = reader.text(item, f"allow.{i}")
        if text is not None and text not in ALLOW:
            reader.problem(item, f'unknown leniency "{text}" in "allow"; {names.suggest(text, list(ALLOW))}')
        elif text is not None and text not in found:
            found.append(text)
    return tuple(found)
