"""A tokenizer as GGUF metadata: tokens, their types, merges or scores, special tokens, the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import UsageError
from merge.gguf_layouts.splitting import SPLITS
from merge.jsontext import parse_json
from merge.quoting import quoted

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BY_SPLITS = {splits: name for name, splits in SPLITS.items()}


def add_vocabulary(writer: GGUFWriter, path: str, config: Mapping[str, Any]) -> None:
    """
    Args:
        path: the model's directory, with tokenizer.json.

    Raises:
        UsageError: no tokenizer.json, or one that llama.cpp has no name for.
    """
    from gguf import SpecialVocab

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise UsageError(
            f"{path}: no tokenizer.json; a GGUF file contains its tokenizer. Save the tokenizer as a fast one."
        )
    text = parse_json(file.read_bytes())
    model = text["model"]
    if model.get("type") != "BPE":
        raise UsageError(
            f"{file}: model {quoted(str(model.get('type')))}: only BPE tokenizers are written to GGUF files."
        )
    size = max(int(config["vocab_size"]), 1 + max(model["vocab"].values()))
    by_bytes = not model.get("byte_fallback")
    tokens, types = _tokens(text, size, by_bytes)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(_splitting(text, str(file)) if by_bytes else "default")
    writer.add_token_list(tokens)
    if not by_bytes:
        writer.add_token_scores(_scores(model, tokens))
    writer.add_token_types(types)
    SpecialVocab(path, load_merges=by_bytes, n_vocab=size).add_to_gguf(writer, quiet=True)
    template = Path(path) / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    if not by_bytes:
        writer.add_add_space_prefix(_adds_space(text))


def _tokens(text: Mapping[str, Any], size: int, by_bytes: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]  # rows of the embedding that no token has
    types = [int(TokenType.UNUSED)] * size
    for token, number in text["model"]["vocab"].items():
        tokens[number] = token
        is_byte = not by_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in text.get("added_tokens") or []:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = text["model"].get("unk_token")
    if unknown is not None and unknown in text["model"]["vocab"] and not by_bytes:
        types[text["model"]["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Minus the rank of the merge that makes each token: llama.cpp merges the pair of the highest score first."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(model.get("merges") or []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, place)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _splitting(text: Mapping[str, Any], file: str) -> str:
    first = text.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers") or [first]
    splits = tuple(filter(None, map(_split, parts)))
    name = _BY_SPLITS.get(splits)
    if name is None:
        found = ", ".join(quoted(part) for part in splits) or "none"
        raise UsageError(
            f"{file}: pre_tokenizer: llama.cpp's name of this way of splitting is not known here (found {found}). "
            "Merge to safetensors, and convert with llama.cpp's convert_hf_to_gguf.py."
        )
    return name


def _split(part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind == "Split":
        return str((part.get("pattern") or {}).get("Regex", "?"))
    if kind == "Digits":
        return "digits" if part.get("individual_digits") else "digits together"
    if kind == "ByteLevel":
        return "bytes" if part.get("use_regex", True) else ""
    return str(kind)


def _adds_space(text: Mapping[str, Any]) -> bool:
    parts = [text.get("normalizer") or {}, *((text.get("normalizer") or {}).get("normalizers") or [])]
    pre = text.get("pre_tokenizer") or {}
    return any(part.get("type") == "Prepend" for part in parts) or pre.get("prepend_scheme") in ("first", "always")
