"""The tokenizer files of an output: copies if nothing changes, else new files that agree with each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from merge.checkpoint.side_files import code_of, list_side_files
from merge.errors import CheckpointError
from merge.plan import SideFile
from merge.planned import Planned
from merge.quoting import quoted, some
from merge.vocabulary.tokenizer import CONFIG, FILE, OTHER_FILES, Tokenizer
from merge.vocabulary.union import Union

TEMPLATE = "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"
# Files that repeat the vocabulary; they would disagree with a changed one.
_STALE = (*OTHER_FILES, "merges.txt", "added_tokens.json")
_TEMPLATES = (TEMPLATE, "chat_template.json")
_TEMPLATE_FOLDERS = ("chat_templates/", "additional_chat_templates/")


def is_template_file(name: str) -> bool:
    return name in _TEMPLATES or name.startswith(_TEMPLATE_FOLDERS)


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer rather than the model (generation, images)."""
    named = (FILE, CONFIG, _SPECIAL, "normalizer.json", *_STALE)
    return name in named or name.endswith((".spm", ".tiktoken")) or is_template_file(name)


def tokenizer_code(directory: str) -> tuple[str, ...]:
    """The Python files of a tokenizer's class, if it is the repository's own."""
    return code_of(directory, CONFIG)


def tokenizer_files(tokenizer: Tokenizer, changed: Union | None, template: str | None) -> Planned[tuple[SideFile, ...]]:
    """The files of a tokenizer's directory for the output.

    Args:
        changed: the contents that replace tokenizer.json; None: unchanged.
        template: the chat template that replaces all others; None: unchanged.
    """
    names = [name for name in list_side_files(tokenizer.directory) if is_tokenizer_file(name)]
    config = copy.deepcopy(tokenizer.config)
    made: dict[str, str] = {}
    notes = []
    if template is not None:
        names = [name for name in names if not is_template_file(name)]
        config.pop("chat_template", None)
        made[TEMPLATE] = template
    if changed is not None:
        stale = [name for name in names if name in _STALE]
        if stale:
            notes.append(f"{', '.join(stale)} of {tokenizer.name} do not describe the new vocabulary and are left out")
        names = [name for name in names if name not in stale]
        made[FILE] = json.dumps(changed.data, ensure_ascii=False, indent=1) + "\n"
        _adapt(config, changed)
    if config != tokenizer.config or (changed is not None and CONFIG not in names):
        made[CONFIG] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    copied = [SideFile.copy(name, f"{tokenizer.directory}/{name}") for name in names if name not in made]
    files = (*copied, *(SideFile(name, text=text) for name, text in made.items()))
    return Planned(files, notes=tuple(notes))


def _adapt(config: dict[str, Any], changed: Union) -> None:
    """tokenizer_config.json for a new tokenizer.json.

    Classes of their own (LlamaTokenizer ...) may build their parts again from files that are not there any more; this
    one reads tokenizer.json as it is.
    """
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("auto_map", None)
    entries = changed.data.get("added_tokens") or []
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries
        }
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            named = {value for role, value in config.items() if role.endswith("_token") and isinstance(value, str)}
            known = {item.get("content") if isinstance(item, dict) else item for item in config[key]} | named
            new = [entry["content"] for entry in entries if entry.get("special") and entry["content"] not in known]
            config[key] = [*config[key], *new]


def check_loads(union: Union, name: str) -> None:
    """Raises CheckpointError unless the tokenizers library reads the file and gives its tokens the ids of the rows."""
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(union.data))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{name}: its tokenizer cannot be united with the others ({error}).") from error
    numbers = loaded.get_vocab(with_added_tokens=True)
    wrong = [token for token, number in union.vocabulary.items() if numbers.get(token) != number]
    if wrong:
        raise CheckpointError(
            f"{name}: the tokenizer that results gives {len(wrong):,} tokens another number, such as "
            f"{quoted(wrong[0])} ({numbers.get(wrong[0])} in place of {union.vocabulary[wrong[0]]}). Please report "
            "this."
        )


def renumbered(
    config: Mapping[str, object],
    old: Mapping[str, int],
    new: Mapping[str, int],
    named: Mapping[str, str],
) -> Planned[dict[str, object]]:
    """A config with the token ids (eos_token_id ...) of another vocabulary.

    A token that is not in it gives way to the one of the same role (`named`: {"eos_token": "</s>"}), or to null.
    """
    tokens = {number: token for token, number in old.items()}
    notes: list[str] = []

    def number(key: str, value: object) -> object:
        if isinstance(value, list):
            return [found for item in value if (found := number(key, item)) is not None] or None
        if not isinstance(value, int) or isinstance(value, bool) or value not in tokens:
            return value
        found = new.get(tokens[value], new.get(named.get(_role(key), "")))
        if found is None:
            notes.append(
                f"{key} {value} ({quoted(tokens[value])}) has no place in the new vocabulary; it is set to null"
            )
        return found

    def walk(part: Mapping[str, object]) -> dict[str, object]:
        return {
            key: walk(value) if isinstance(value, dict) else number(key, value) if _is_id_key(key) else value
            for key, value in part.items()
        }

    return Planned(walk(config), notes=tuple(notes))


def _is_id_key(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index", "_token_ids"))


def _role(key: str) -> str:
    return key.rpartition("_")[0]


def named_in(tokens: Iterable[str], limit: int = 3) -> str:
    """ "'a', 'b' and 7 more" """
    return some([quoted(token) for token in tokens], limit)
