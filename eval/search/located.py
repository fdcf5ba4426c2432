"""A recipe's tree with its local models by their absolute paths, so that its text may lie anywhere."""

from __future__ import annotations

import os

import yaml

from eval.search.places import scalar
from merge.recipe.mentioned import mentioned
from merge.recipe.model import ModelRef, Recipe

_REFERENCES = ("model", "base_model", "source_model", "path", "lora", "config_donor", "tokenizer_donor", "source")


def located(node: yaml.Node, recipe: Recipe) -> yaml.Node:
    """The tree with local models by their absolute paths."""
    places = {ref.text: _absolute(ref) for ref, _ in mentioned(recipe).values()}

    def walk(node: yaml.Node, key: str) -> yaml.Node:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, walk(v, str(k.value))) for k, v in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
        if isinstance(node, yaml.SequenceNode):
            items = [walk(item, "") for item in node.value]
            return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
        if key in _REFERENCES or key == "tokenizer_source":
            found = places.get(str(node.value))
            return node if found is None else scalar(found, node)
        return node

    return walk(node, "")


def _absolute(ref: ModelRef) -> str | None:
    """None for what may not be written in another way: a hub id, or an adapter named apart."""
    if not os.path.isabs(ref.path) or ref.revision is not None:
        return None
    if ref.adapter is None:
        return ref.path
    both = os.path.isabs(ref.adapter.path) and ref.adapter.revision is None
    return f"{ref.path}+{ref.adapter.path}" if both else None
