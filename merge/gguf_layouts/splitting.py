"""How llama.cpp calls ways of splitting a text before byte pairs are merged.

A way is the regular expressions of the splits in tokenizer.json, "digits" for single digits, and "bytes" where
ByteLevel splits too. Source: llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe).
"""

from __future__ import annotations

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": ("bytes",),
    "smollm": ("digits", "bytes"),
    "llama-bpe": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,),
    "qwen2": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,),
}
