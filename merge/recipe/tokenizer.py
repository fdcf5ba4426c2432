"""`tokenizer`, `tokenizer_source` and `chat_template` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from merge.chat import named as chat
from merge.recipe.model import TokenizerSettings, TokenRow
from merge.recipe.reader import RecipeReader
from merge.schema.names import suggest
from merge.schema.reader import join
from merge.schema.scalars import shown

_OLD_PREFIX = "model:"  # as early versions of mergekit had it


def read_source(reader: RecipeReader, fields: Mapping[str, yaml.Node]) -> str | None:
    """ "base", "union" or a model's text, from either spelling."""
    node, path = fields.get("tokenizer_source"), "tokenizer_source"
    for key in ("tokenizer", "tokenizer_source"):
        if "tokenizer_donor" in fields and key in fields:
            message = f'"{key}" arranges tokens and chooses their tokenizer; keep it or "tokenizer_donor"'
            reader.problem(fields["tokenizer_donor"], message)
    if "tokenizer" in fields:
        if node is not None:
            reader.problem(node, '"tokenizer_source" and "tokenizer" have the same meaning; keep one of them')
        values = fields["tokenizer"].value if isinstance(fields["tokenizer"], yaml.MappingNode) else []
        node = next((value for key, value in values if key.value == "source"), None)
        path = "tokenizer.source"
        if node is None:
            return "union"  # mergekit's default for a `tokenizer` without a source
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode) and node.value in ("base", "union"):
        return str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.value.startswith(_OLD_PREFIX):
        plain = node.value.removeprefix(_OLD_PREFIX)
        if reader.compat is None:
            message = f'"{path}" names a model without "{_OLD_PREFIX}" before it; write {plain}'
            reader.problem(node, message, path)
            return None
        node = yaml.ScalarNode(node.tag, plain, node.start_mark, node.end_mark)
    model = reader.reference(node, path)
    return model.text if model else None


def read_tokenizer(reader: RecipeReader, node: yaml.Node | None) -> TokenizerSettings | None:
    if node is None:
        return None
    fields = reader.mapping(node, "tokenizer", "tokenizer")
    tokens: dict[str, TokenRow] = {}
    if "tokens" in fields:
        for token, _, value in reader.pairs(fields["tokens"], "tokenizer.tokens", '"tokens"'):
            found = _token(reader, value, token, join("tokenizer.tokens", token))
            if found is not None:
                tokens[token] = found
    return TokenizerSettings(tokens, fields.integer("pad_to_multiple_of"))


def _token(reader: RecipeReader, node: yaml.Node, token: str, path: str) -> TokenRow | None:
    fields = reader.mapping(node, path, "token")
    force = fields.boolean("force") or False
    source = fields.get("source")
    if source is None:
        if force:
            reader.problem(node, f'"force: true" of the token "{token}" needs a "source" to take its row from', path)
        return TokenRow(force=False)
    keys = {key.value for key, _ in source.value} if isinstance(source, yaml.MappingNode) else set()
    if "kind" not in keys:
        model = reader.reference(source, join(path, "source"))
        return None if model is None else TokenRow("model", model, force=force)
    return _of_kind(reader, source, join(path, "source"), force)


def _of_kind(reader: RecipeReader, node: yaml.Node, path: str, force: bool) -> TokenRow | None:
    fields = reader.mapping(node, path, "token source")
    kind = fields.text("kind")
    if kind is None:
        return None
    if kind == "zero":
        if len(fields) > 1:
            reader.problem(node, 'a token\'s source of kind "zero" has no other key')
        return TokenRow("zero", force=force)
    model = reader.reference(*fields.at("model"))
    given = [key for key in ("token", "token_id") if key in fields]
    if "model" not in fields or len(given) != 1:
        reader.problem(node, 'a token\'s source of kind "model_token" needs "model" and one of "token" and "token_id"')
        return None
    number = fields.integer("token_id")
    text = fields.get("token")
    if text is not None and not isinstance(text, yaml.ScalarNode):
        reader.problem(text, f'"token" must be a token, not {shown(text)}')
        return None
    if model is None or (text is None and number is None):
        return None
    return TokenRow("model_token", model, None if text is None else str(text.value), number, force)


def read_template(reader: RecipeReader, node: yaml.Node | None) -> str | None:
    """ "auto", a known name, or a template that parses."""
    text = reader.text(node, "chat_template")
    if node is None or text is None:
        return None
    if chat.is_text(text):
        from merge.chat.render import syntax_error

        wrong = syntax_error(text)
        if wrong is not None:
            reader.problem(node, f'"chat_template" is not a valid Jinja template: {wrong}', "chat_template")
            return None
    elif text not in ("auto", *chat.NAMED):
        known = ("auto", *chat.NAMED)
        message = f"unknown chat_template {shown(node)}; {suggest(text, known)}"
        reader.problem(node, message + " (a template of your own is Jinja, with braces)", "chat_template")
        return None
    return text
