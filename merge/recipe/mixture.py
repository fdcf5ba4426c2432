"""A mixture of experts, in mergekit-moe's schema, with attention, reinit, name, seed, allow and out_dtype of our own.

The models of a mixture are a Recipe's `base_model` and `models`: first the experts, then the shared experts, in the
order written. Its `merge_method` applies to everything but the experts' MLPs: passthrough of the base
alone, or a merge of the experts. Mixture holds what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import yaml

from merge.methods.registry import Method
from merge.moe_layouts import all_layouts
from merge.quoting import clipped
from merge.recipe import names
from merge.recipe.fields import read_allow, read_compat, read_dtype, read_name
from merge.recipe.keys import GATE_MODES, LEVELS, PROMPTED
from merge.recipe.model import Expert, Mixture, Recipe, Source
from merge.recipe.reader import UNREADABLE, RecipeReader
from merge.recipe.settings import read_settings
from merge.schema.document import line_of
from merge.schema.names import suggest
from merge.schema.reader import Fields, join
from merge.schema.scalars import shown

# Keys by which this schema is recognised.
KEYS = ("experts", "shared_experts", "gate_mode", "experts_per_token")


def is_mixture(root: yaml.MappingNode) -> bool:
    return any(key.value in KEYS for key, _ in root.value)


def build_mixture(reader: RecipeReader, root: yaml.MappingNode, text: str) -> Recipe:
    """Reads the recipe; the reader collects problems."""
    fields = reader.mapping(root, "", "mixture")
    if "base_model" not in fields:
        reader.problem(root, 'a mixture needs "base_model", whose attention, norms and embeddings it gets')
    base = reader.reference(*fields.at("base_model"))
    experts = _experts(reader, *fields.at("experts"))
    shared = _experts(reader, *fields.at("shared_experts"))
    sources = (*(source for source, _ in experts), *(source for source, _ in shared))
    for i in range(len(sources)):
        place = f"experts.{i}" if i < len(experts) else f"shared_experts.{i - len(experts)}"
        reader.lines[f"models.{i}.model"] = reader.line(f"{place}.source_model")
    mixture = Mixture(
        experts=tuple(expert for _, expert in experts),
        shared=tuple(expert for _, expert in shared),
        gate_mode=_gate_mode(reader, fields.get("gate_mode")),
        experts_per_token=_per_token(reader, fields, len(experts)),
        architecture=_architecture(reader, fields.get("architecture")),
        reinit=_reinit(reader, fields.get("reinit")),
    )
    if not experts and "experts" not in reader.broken:
        message = 'a mixture needs "experts", a list of {source_model, positive_prompts}'
        reader.problem(reader.line("experts"), message)
    elif mixture.gate_mode in PROMPTED:
        _check_prompts(reader, mixture)
    recipe = Recipe(
        merge_method="passthrough",
        models=sources,
        base_model=base,
        dtype=read_dtype(reader, *fields.at("dtype")),
        out_dtype=read_dtype(reader, *fields.at("out_dtype")),
        name=read_name(reader, fields.get("name")),
        seed=fields.integer("seed") or 0,
        allow=read_allow(reader, fields.get("allow")),
        compat=read_compat(reader, fields),
        notes=reader.notes(),
        text=text,
        file=reader.file,
        lines=reader.lines,
        mixture=mixture,
    )
    return _with_attention(reader, fields.get("attention"), recipe)


def _experts(reader: RecipeReader, node: yaml.Node | None, path: str) -> list[tuple[Source, Expert]]:
    return [_expert(reader, item, join(path, str(i))) for i, item in enumerate(reader.items(node, path))]


def _expert(reader: RecipeReader, node: yaml.Node, path: str) -> tuple[Source, Expert]:
    fields = reader.mapping(node, path, "expert")
    if "source_model" not in fields and path not in reader.broken:
        reader.problem(node, f'{LEVELS["expert"]} needs the key "source_model"', path)
    model = reader.reference(*fields.at("source_model")) or UNREADABLE
    line = line_of(node)
    expert = Expert(
        positive=_prompts(reader, *fields.at("positive_prompts")),
        negative=_prompts(reader, *fields.at("negative_prompts")),
        noise_scale=fields.number("noise_scale") or 0.0,
        residual_scale=1.0 if (scale := fields.number("residual_scale")) is None else scale,
        line=line,
    )
    return Source(model, line=line), expert


def _prompts(reader: RecipeReader, node: yaml.Node | None, path: str) -> tuple[str, ...]:
    key = path.rpartition(".")[2]
    found = []
    for item in reader.items(node, path):
        if isinstance(item, yaml.ScalarNode) and item.tag.endswith(":str"):
            found.append(str(item.value))
            continue
        hint = f'; quote it: "{clipped(item.value)}"' if isinstance(item, yaml.ScalarNode) else ""
        reader.problem(item, f'an entry of "{key}" must be a string, not {shown(item)}{hint}', path)
    return tuple(found)


def _word(reader: RecipeReader, node: yaml.Node | None, key: str, known: tuple[str, ...]) -> str | None:
    text = reader.text(node, key)
    if text is None or text.lower() in known:
        return None if text is None else text.lower()
    assert node is not None
    reader.problem(node, f'unknown {key} "{text}"; {suggest(text, known)}', key)
    return None


def _gate_mode(reader: RecipeReader, node: yaml.Node | None) -> str:
    return _word(reader, node, "gate_mode", GATE_MODES) or ("zero" if "gate_mode" in reader.broken else "hidden")


def _architecture(reader: RecipeReader, node: yaml.Node | None) -> str | None:
    """The name of a layout, or "qwen", for which the models decide."""
    words = {word: name for name, layout in all_layouts().items() for word in layout.words}
    words |= dict.fromkeys(("qwen", "qwen moe"), "qwen")
    word = _word(reader, node, "architecture", tuple(words))
    return None if word is None else words[word]


def _per_token(reader: RecipeReader, fields: Fields, n_experts: int) -> int:
    value, given = fields.integer("experts_per_token"), "experts_per_token" in fields
    if value is None and given:
        return 1
    chosen = 2 if value is None else value
    if 0 < n_experts < chosen:
        there = "1 expert is" if n_experts == 1 else f"{n_experts} experts are"
        reader.problem(
            reader.line("experts_per_token" if given else "experts"),
            f'"experts_per_token" is {chosen}{"" if given else " by default"}, and only {there} listed',
        )
    return chosen


def _reinit(reader: RecipeReader, node: yaml.Node | None) -> float:
    if node is None:
        return 0.0
    fields = reader.mapping(node, "reinit", "reinit")
    if "ratio" not in fields and "reinit" not in reader.broken:
        reader.problem(node, '"reinit" needs the key "ratio": the share of neurons that are drawn at random again')
    return fields.number("ratio") or 0.0


def _check_prompts(reader: RecipeReader, mixture: Mixture) -> None:
    mode = mixture.gate_mode
    for i, expert in enumerate(mixture.experts):
        path = f"experts.{i}"
        if not expert.positive and not reader.broken.intersection((path, f"{path}.positive_prompts")):
            message = (
                f'gate_mode "{mode}" needs "positive_prompts" for each expert: texts like those it should receive; '
                "without any, gate_mode random or zero makes a router to be trained"
            )
            reader.problem(expert.line, message)
    for key, experts in (("experts", mixture.experts), ("shared_experts", mixture.shared)):
        for i, expert in enumerate(experts):
            if expert.negative and not expert.positive and key == "shared_experts":
                reader.problem(expert.line, '"negative_prompts" need "positive_prompts" beside them')
            if expert.positive and expert.positive == expert.negative:
                message = "its positive and negative prompts are the same, so nothing is left for the router"
                reader.problem(reader.line(f"{key}.{i}"), message)
    prompts = [(expert.positive, expert.negative) for expert in mixture.experts]
    if len(prompts) > 1 and prompts[0][0] and all(each == prompts[0] for each in prompts):
        message = "all experts have the same prompts, so the router cannot tell them apart"
        reader.problem(reader.line("experts"), message)


def _with_attention(reader: RecipeReader, node: yaml.Node | None, recipe: Recipe) -> Recipe:
    """`attention`: base; or average, or {merge_method, parameters}, over the experts (Branch-Train-MiX)."""
    if node is None:
        return recipe
    fields: Mapping[str, yaml.Node] = {}
    name: str | None
    if isinstance(node, yaml.MappingNode):
        fields = reader.mapping(node, "attention", "attention")
        name = fields.text("merge_method")
        if "merge_method" not in fields:
            reader.problem(node, '"attention" needs the key "merge_method"', "attention")
    else:
        word = _word(reader, node, "attention", ("base", "average"))
        if word in (None, "base"):
            return recipe
        name = "linear"
    if name is None:
        return recipe
    method = reader.methods.get(name)
    if method is None:
        reader.problem(fields["merge_method"], names.unknown_method(name, reader.methods))
        return recipe
    with reader.scope(method):
        parameters = dict(read_settings(reader, fields.get("parameters"), "parameters", "shared"))
    weight = method.parameter("weight")
    if weight is not None and weight.required and "parameters.weight" not in reader.lines:
        parameters["weight"] = 1.0
    reader.lines["attention"] = line_of(node)
    _check_attention(reader, node, method, parameters)
    return dataclasses.replace(recipe, merge_method=name, parameters=parameters)


def _check_attention(reader: RecipeReader, node: yaml.Node, method: Method, parameters: Mapping[str, object]) -> None:
    """Checks that the method can merge the experts with these parameters."""
    if method.name == "passthrough":
        reader.problem(
            node, 'passthrough merges nothing; "attention: base" takes everything but the experts from the base'
        )
        return
    for parameter in method.parameters:
        written = f"parameters.{parameter.name}" in reader.lines
        if parameter.required and parameter.name not in parameters and not written:
            message = (
                f'{method.name} needs the parameter "{parameter.name}": write it under "parameters" of "attention"'
            )
            reader.problem(node, message)
    if method.statistics is not None:
        reader.problem(node, f'{method.name} needs statistics of each model, which "attention" cannot name')
