"""The tree of a recipe -> Draft, without the disk or the hub: one function for each level of the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from merge.methods.registry import Method, all_methods
from merge.quoting import clipped
from merge.recipe import names
from merge.recipe.fields import read_allow, read_compat, read_dtype, read_name
from merge.recipe.keys import LEVELS
from merge.recipe.mixture import build_mixture, is_mixture
from merge.recipe.model import COMPAT, Module, Recipe, Slice, Source, Upscale
from merge.recipe.reader import UNREADABLE, RecipeReader
from merge.recipe.references import StageNames
from merge.recipe.settings import read_settings
from merge.recipe.tokenizer import read_source, read_template, read_tokenizer
from merge.schema.document import line_of
from merge.schema.reader import join
from merge.schema.scalars import NULL, as_integer, shown

PASSTHROUGH = "passthrough"  # the method of `upscale` if none is written


@dataclass(frozen=True)
class Draft:
    """A recipe as written, before models are looked for on the disk or the hub.

    Attributes:
        recipe: its references are as written; see ModelRef.
        reader: the lines of all keys, and the problems in the text.
    """

    recipe: Recipe
    reader: RecipeReader


def draft_of(
    root: yaml.MappingNode, text: str, file: str | None, stages: StageNames | None = None, compat: str | None = None
) -> Draft:
    """A document's tree -> Draft, from its text alone; `stages`: the names of the other documents in the file."""
    reader = RecipeReader(file, all_methods(), stages, compat or _written_compat(root))
    return Draft((build_mixture if is_mixture(root) else _build)(reader, root, text), reader)


def _build(reader: RecipeReader, root: yaml.MappingNode, text: str) -> Recipe:
    """Reads every level. The reader collects problems; the rest of the recipe is still built."""
    # Methods are read first: they decide which parameters are known, whatever the order of the keys.
    reader.method = _method_at(reader, root, reader.methods.get(PASSTHROUGH) if _value(root, "upscale") else None)
    reader.in_use = tuple(dict.fromkeys(_methods_in(reader, root)))
    fields = reader.mapping(root, "", "recipe")
    merge_method = _method(reader, root, fields.get("merge_method"), "upscale" in fields)
    return Recipe(
        merge_method=merge_method,
        models=_models(reader, *fields.at("models")),
        slices=_slices(reader, *fields.at("slices")),
        modules=_modules(reader, fields.get("modules")),
        base_model=reader.reference(*fields.at("base_model")),
        parameters=read_settings(reader, *fields.at("parameters"), "shared"),
        dtype=read_dtype(reader, *fields.at("dtype")),
        out_dtype=read_dtype(reader, *fields.at("out_dtype")),
        tokenizer_source=read_source(reader, fields),
        tokenizer=read_tokenizer(reader, fields.get("tokenizer")),
        chat_template=read_template(reader, fields.get("chat_template")),
        name=read_name(reader, fields.get("name")),
        seed=fields.integer("seed") or 0,
        allow=read_allow(reader, fields.get("allow")),
        align=fields.text("align"),
        upscale=_upscale(reader, fields.get("upscale")),
        config_donor=reader.reference(*fields.at("config_donor")),
        tokenizer_donor=reader.reference(*fields.at("tokenizer_donor")),
        compat=read_compat(reader, fields),
        notes=reader.notes(),
        text=text,
        file=reader.file,
        lines=reader.lines,
    )


def _plain_pairs(node: yaml.Node) -> list[tuple[str, yaml.Node, yaml.Node]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key.value, key, value) for key, value in pairs if isinstance(key, yaml.ScalarNode)]


def _value(node: yaml.Node, key: str) -> yaml.Node | None:
    """The value of a key, read ahead of the other keys."""
    return next((value for found, _, value in _plain_pairs(node) if found == key), None)


def _method_at(reader: RecipeReader, node: yaml.Node, outer: Method | None) -> Method | None:
    """The method of a recipe, module or slice: its own, or that of the level around it."""
    named = _value(node, "merge_method")
    if named is None or named.tag == NULL:
        return outer
    return reader.methods.get(named.value) if isinstance(named.value, str) else None


def _methods_in(reader: RecipeReader, node: yaml.Node, outer: Method | None = None) -> Iterator[Method]:
    """The methods of a recipe or module and of the levels inside it, its own first."""
    method = _method_at(reader, node, outer or reader.method)
    if method is not None:
        yield method
    slices, modules = _value(node, "slices"), _value(node, "modules")
    for piece in slices.value if isinstance(slices, yaml.SequenceNode) else ():
        if (own := _method_at(reader, piece, method)) is not None:
            yield own
    for _, _, module in _plain_pairs(modules) if modules is not None else ():
        yield from _methods_in(reader, module, method)


def _own_method(reader: RecipeReader, node: yaml.Node | None, path: str) -> str | None:
    """The merge_method of a slice or module itself."""
    name = reader.text(node, path)
    if node is not None and name and name not in reader.methods:
        reader.problem(node, names.unknown_method(name, reader.methods), path)
        return None
    return name


def _method(reader: RecipeReader, root: yaml.Node, node: yaml.Node | None, implied: bool) -> str:
    if node is None and implied:
        return PASSTHROUGH
    if node is None:
        at = reader.lines.get("merge_method", line_of(root))
        reader.problem(at, f'"merge_method" is missing, for example "linear" or "ties"; {names.ALL_METHODS}')
        return ""
    name = reader.text(node, "merge_method") or ""
    if name and reader.method is None:
        reader.problem(node, names.unknown_method(name, reader.methods))
    return name


def _models(reader: RecipeReader, node: yaml.Node | None, path: str) -> tuple[Source, ...]:
    items = reader.items(node, path)
    return tuple(_source(reader, item, join(path, str(i)), "model") for i, item in enumerate(items))


def _source(reader: RecipeReader, node: yaml.Node, path: str, level: str) -> Source:
    """An entry of `models` or of `sources`; the latter has a layer_range."""
    if isinstance(node, yaml.ScalarNode):
        message = f'{LEVELS[level]} must be a mapping, not {shown(node)}; write "- model: {clipped(node.value)}"'
        reader.problem(node, message, path)
        return Source(UNREADABLE, line=line_of(node))
    fields = reader.mapping(node, path, level)
    if "model" not in fields and path not in reader.broken:
        reader.problem(node, f'{LEVELS[level]} needs the key "model"', path)
    layer_range = None
    if level == "source":
        layer_range = _layer_range(reader, node, fields.get("layer_range"), path)
    return Source(
        model=reader.reference(*fields.at("model")) or UNREADABLE,
        layer_range=layer_range,
        parameters=read_settings(reader, *fields.at("parameters"), "model"),
        line=line_of(node),
        statistics=fields.text("statistics"),
    )


def _layer_range(
    reader: RecipeReader, around: yaml.Node, node: yaml.Node | None, source_path: str
) -> tuple[int, int] | None:
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
    if end < start:
        message = f'"layer_range" [{start}, {end}] ends before it begins; write [first, end), the end not included'
        reader.problem(node, message, path)
        return None
    return start, end


def _range_shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode) and len(node.value) <= 8:
        return "[" + ", ".join(shown(item) for item in node.value) + "]"
    return shown(node)


def _slices(reader: RecipeReader, node: yaml.Node | None, path: str) -> tuple[Slice, ...]:
    items = reader.items(node, path)
    return tuple(_slice(reader, item, join(path, str(i))) for i, item in enumerate(items))


def _slice(reader: RecipeReader, node: yaml.Node, path: str) -> Slice:
    with reader.scope(_method_at(reader, node, reader.method)):
        return _scoped_slice(reader, node, path)


def _scoped_slice(reader: RecipeReader, node: yaml.Node, path: str) -> Slice:
    fields = reader.mapping(node, path, "slice")
    node_of_sources, sources_path = fields.at("sources")
    sources = reader.items(node_of_sources, sources_path)
    if not sources and path not in reader.broken and sources_path not in reader.broken:
        reader.problem(node, 'an entry of "slices" needs "sources", a list of {model, layer_range}', sources_path)
    return Slice(
        sources=tuple(_source(reader, item, join(sources_path, str(i)), "source") for i, item in enumerate(sources)),
        base_model=reader.reference(*fields.at("base_model")),
        parameters=read_settings(reader, *fields.at("parameters"), "shared"),
        line=line_of(node),
        merge_method=_own_method(reader, *fields.at("merge_method")),
    )


def _modules(reader: RecipeReader, node: yaml.Node | None) -> Mapping[str, Module]:
    modules = {}
    for name, _, value in reader.pairs(node, "modules", '"modules"') if node is not None else ():
        with reader.scope(_method_at(reader, value, reader.method), *_methods_in(reader, value)):
            modules[name] = _module(reader, value, join("modules", name))
    return modules


def _module(reader: RecipeReader, node: yaml.Node, path: str) -> Module:
    fields = reader.mapping(node, path, "module")
    return Module(
        slices=_slices(reader, *fields.at("slices")),
        models=_models(reader, *fields.at("models")),
        parameters=read_settings(reader, *fields.at("parameters"), "shared"),
        merge_method=_own_method(reader, *fields.at("merge_method")),
    )


def _upscale(reader: RecipeReader, node: yaml.Node | None) -> Upscale | None:
    if node is None:
        return None
    fields = reader.mapping(node, "upscale", "upscale")
    numbers = {key: fields.integer(key) for key in ("overlap", "layers", "insert_every")}
    given = [key for key in numbers if key in fields]
    if len(given) != 1 and "upscale" not in reader.broken:
        found = f", not {' and '.join(given)}" if given else ""
        message = f'"upscale" needs one of overlap, layers and insert_every{found}; for example upscale: {{overlap: 8}}'
        reader.problem(node, message, "upscale")
    zero_init = fields.boolean("zero_init")
    if "zero_init" in fields and "insert_every" not in fields:
        message = '"zero_init" is for layers that are inserted; give it with insert_every'
        reader.problem(fields["zero_init"], message)
    return Upscale(**numbers, zero_init=zero_init is not False)


def _written_compat(root: yaml.MappingNode) -> str | None:
    """The value of `compat:`, read ahead because other keys depend on it."""
    node = _value(root, "compat")
    return node.value if isinstance(node, yaml.ScalarNode) and node.value in COMPAT else None
