"""The tokenizer of a GGUF file as files of transformers: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from merge.errors import CheckpointError
from merge.gguf_layouts.splitting import SPLITS
from merge.quoting import quoted

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_T = "tokenizer.ggml."


def tokenizer_files(path: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Raises CheckpointError for a tokenizer that is not BPE, or whose way of splitting is not known."""
    kind = metadata.get(f"{_T}model")
    tokens, types = metadata[f"{_T}tokens"], metadata.get(f"{_T}token_type") or []
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{path}: tokenizer.ggml.model: {quoted(str(kind))}: expected gpt2 or llama (BPE).")
    if len(types) != len(tokens):
        types = [_NORMAL] * len(tokens)
    text = _bytes(path, metadata, tokens, types) if kind == "gpt2" else _pieces(metadata, tokens, types)
    special = {
        f"{name}_token": tokens[number]
        for name in ("bos", "eos", "unk", "pad")
        if isinstance(number := metadata.get(f"{_T}{name if name != 'unk' else 'unknown'}_token_id"), int)
        and 0 <= number < len(tokens)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if metadata.get(f"{_T}add_bos_token") and "bos_token" in special:
        text["post_processor"] = _begins_with(special["bos_token"], metadata[f"{_T}bos_token_id"])
    files = {
        "tokenizer.json": json.dumps(text, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        files["chat_template.jinja"] = template
    return files


def _bytes(path: str, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """Byte pairs, as GPT-2 has them."""
    pre = str(metadata.get(f"{_T}pre", "default"))
    if pre not in SPLITS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre: {quoted(pre)}: expected {', '.join(SPLITS)}.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    *splits, last = SPLITS[pre]
    parts = [
        {"type": "Digits", "individual_digits": True}
        if split == "digits"
        else {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in (splits if last == "bytes" else [*splits, last])
    ]
    parts.append(byte_level | {"use_regex": last == "bytes"})
    return {
        **_common(tokens, types),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0],
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": _vocabulary(tokens, types),
            "merges": [merge.split(" ", 1) for merge in metadata.get(f"{_T}merges") or []],
            "fuse_unk": False,
            "byte_fallback": False,
        },
    }


def _pieces(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """SentencePiece's BPE: the pair whose token has the highest score is merged first."""
    scores = metadata.get(f"{_T}scores") or [0.0] * len(tokens)
    known = {token: number for number, token in enumerate(tokens) if types[number] in (_NORMAL, _USER)}
    merges = [
        (-scores[number], known[token[:cut]], known[token[cut:]], token[:cut], token[cut:])
        for token, number in known.items()
        if types[number] == _NORMAL
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    prefix = bool(metadata.get(f"{_T}add_space_prefix", True))
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    return {
        **_common(tokens, types),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), *normalizers],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "vocab": _vocabulary(tokens, types),
            "merges": [[left, right] for _, _, _, left, right in sorted(merges)],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _common(tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    added = [
        {"id": number, "content": tokens[number], "special": types[number] != _USER}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for number in range(len(tokens))
        if types[number] in (_CONTROL, _USER, _UNKNOWN)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Without the rows of the embedding that no token has."""
    return {token: number for number, token in enumerate(tokens) if types[number] != _UNUSED}


def _begins_with(token: str, number: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
