"""Reads the tokenizer files of a model directory as plain data; only the fallback loads a library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge.checkpoint.files import inside, read_json
from merge.errors import CheckpointError
from merge.jsontext import parse_json
from merge.quoting import excerpt

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# Files from which transformers makes a tokenizer without tokenizer.json.
OTHER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer.

    Attributes:
        name: for messages.
        directory: of its files.
        data: contents of tokenizer.json.
        config: contents of tokenizer_config.json; {} without one.
        vocabulary: token -> id, added tokens included.
        added: added tokens by content: {"content", "id", "special", "lstrip", ...}.
        named: special tokens by role, such as {"eos_token": "</s>"}.
        template: the default chat template, if there is one.
    """

    name: str
    directory: str
    data: dict[str, Any]
    config: dict[str, Any]
    vocabulary: Mapping[str, int]
    added: Mapping[str, dict[str, Any]]
    named: Mapping[str, str]
    template: str | None

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return model_kind(self.data["model"])

    @property
    def n_entries(self) -> int:
        """Tokens and merges."""
        return len(self.vocabulary) + len(self.data["model"].get("merges") or ())

    @property
    def is_converted(self) -> bool:
        """Whether it was made from other files, without tokenizer.json."""
        return not os.path.isfile(os.path.join(self.directory, FILE))

    @property
    def n_ids(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def alphabet(self) -> str:
        """How tokens encode text: "bytes" (GPT-2's printable bytes), "metaspace" (SentencePiece's), "##" or "plain"."""
        if self.kind == "WordPiece":
            return "##"
        types = {part.get("type") for part in pipeline(self.data)}
        if "ByteLevel" in types:
            return "bytes"
        spaced = any("\u2581" in json.dumps(part, ensure_ascii=False) for part in pipeline(self.data))
        return "metaspace" if "Metaspace" in types or spaced or self.kind == "Unigram" else "plain"


def model_kind(model: Mapping[str, Any]) -> str:
    """The model's type; old files leave it out."""
    if isinstance(model.get("type"), str):
        return str(model["type"])
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def pipeline(
    data: Mapping[str, Any], keys: tuple[str, ...] = ("normalizer", "pre_tokenizer", "decoder")
) -> Iterator[Any]:
    """The parts of normalizer, pre-tokenizer and decoder, with sequences flattened."""
    for key in keys:
        todo = [data.get(key)]
        while todo:
            part = todo.pop()
            if isinstance(part, dict):
                for nested in ("normalizers", "pretokenizers", "decoders", "processors"):
                    todo += part.get(nested) or []
                yield part


def has_tokenizer(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in (FILE, *OTHER_FILES))


def read_tokenizer(directory: str, name: str) -> Tokenizer:
    """Reads the tokenizer of a directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = inside(directory, FILE)
    if os.path.isfile(path):
        data = _read(path)
    elif has_tokenizer(directory):
        data = _converted(directory)
        path = directory
    else:
        raise CheckpointError(
            f"{directory}: has no tokenizer: expected {FILE} (or {', '.join(OTHER_FILES[:2])} ...). "
            "Copy the tokenizer's files there from the model's page."
        )
    config_path = inside(directory, CONFIG)
    config = _read(config_path) if os.path.isfile(config_path) else {}
    vocabulary = _model_vocabulary(data, path)
    added = _added(data, path)
    vocabulary.update((content, entry["id"]) for content, entry in added.items())
    _add_listed(directory, config, vocabulary, added)
    try:
        "".join(vocabulary).encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: a token holds half a surrogate pair. Download the file again.") from None
    return Tokenizer(
        name, directory, data, config, vocabulary, added, _named(directory, config), read_template(directory, config)
    )


def _read(path: str) -> dict[str, Any]:
    return read_json(path, unique=False)  # as the libraries do: the last one wins


def _converted(directory: str) -> dict[str, Any]:
    """tokenizer.json made by transformers from a SentencePiece model, vocab.json with merges.txt, or vocab.txt."""
    from merge.loading import load_tokenizer

    tokenizer = load_tokenizer(directory)
    try:
        data: dict[str, Any] = parse_json(tokenizer.backend_tokenizer.to_str())
        return data
    except Exception as error:  # any error of its many readers
        reason = excerpt((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise CheckpointError(
            f"{directory}: has no {FILE}, and transformers cannot make one of the other files ({reason}). "
            f"Save it once with transformers (AutoTokenizer ... save_pretrained), or download {FILE}."
        ) from error


def _model_vocabulary(data: dict[str, Any], path: str) -> dict[str, int]:
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        if all(_is_piece(piece) for piece in vocab):
            return {piece[0]: number for number, piece in enumerate(vocab)}
    elif isinstance(vocab, dict) and all(_is_id(number) for number in vocab.values()):
        merges = model.get("merges") or []
        if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
            raise CheckpointError(f"{path}: model.merges: expected pairs of tokens. Download the file again.")
        return dict(vocab)
    raise CheckpointError(
        f"{path}: model.vocab: expected tokens with their ids (or pieces with their scores). Download the file again."
    )


def _is_piece(piece: Any) -> bool:
    return isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and type(piece[1]) in (int, float)


def _is_merge(merge: Any) -> bool:
    if isinstance(merge, str):
        return merge.count(" ") == 1
    return isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)


def _added(data: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id"))
        for entry in entries
    ):
        raise CheckpointError(f"{path}: added_tokens: expected a list of {{id, content}}. Download the file again.")
    return {entry["content"]: entry for entry in entries}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _add_listed(
    directory: str, config: dict[str, Any], vocabulary: dict[str, int], added: dict[str, dict[str, Any]]
) -> None:
    """Added tokens that only tokenizer_config.json or added_tokens.json have; transformers adds them when it loads."""
    listed: dict[str, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(number).isdecimal():
            listed[entry["content"]] = {**_PLAIN, **entry, "id": int(number)}
    path = os.path.join(directory, "added_tokens.json")
    if os.path.isfile(path):
        for content, number in _read(path).items():
            if _is_id(number):
                listed.setdefault(content, {**_PLAIN, "content": content, "id": number})
    taken = set(vocabulary.values())
    for content, entry in sorted(listed.items(), key=lambda item: item[1]["id"]):
        entry = {key: entry[key] for key in ("id", "content", *_PLAIN)}
        if content in vocabulary and content not in added:
            added[content] = entry | {"id": vocabulary[content]}
        elif content not in vocabulary and entry["id"] not in taken:
            vocabulary[content] = entry["id"]
            added[content] = entry


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _named(directory: str, config: dict[str, Any]) -> dict[str, str]:
    path = os.path.join(directory, "special_tokens_map.json")
    others = _read(path) if os.path.isfile(path) else {}
    found = {}
    for role in NAMED:
        value = config.get(role) or others.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[role] = value
    return found


def read_template(directory: str, config: dict[str, Any] | None = None) -> str | None:
    """The default chat template, as transformers finds it: a file first, then the config."""
    if config is None:
        config_path = inside(directory, CONFIG)
        config = _read(config_path) if os.path.isfile(config_path) else {}
    path = inside(directory, "chat_template.jinja")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None
    legacy = inside(directory, "chat_template.json")
    value: Any = config.get("chat_template")
    if value is None and os.path.isfile(legacy):
        value = _read(legacy).get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    elif isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
