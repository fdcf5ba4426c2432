"""Maps tokens to the bytes of their text, so that equal tokens of different families can be matched.

Byte-level BPE writes a space as one letter of its own alphabet, SentencePiece as U+2581, WordPiece leaves it out before
words and marks what follows within one. " the" is the same token in all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from merge.vocabulary.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the letters from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _byte_letters()


def surfaces(tokenizer: Tokenizer) -> dict[int, bytes]:
    """id -> the bytes of its text, for all tokens but special ones (which stand for no text)."""
    prefix = tokenizer.data["model"].get("continuing_subword_prefix") or "##"
    found = {}
    for token, number in tokenizer.vocabulary.items():
        if token in tokenizer.added:
            if not is_special(tokenizer, token):
                found[number] = token.encode()
        else:
            found[number] = surface(token, tokenizer.alphabet, prefix)
    return found


def surface(token: str, alphabet: str, prefix: str = "##") -> bytes:
    """The bytes of one token's text."""
    if alphabet == "bytes":
        if all(letter in LETTERS for letter in token):
            return bytes(LETTERS[letter] for letter in token)
        return token.encode()
    if alphabet == "metaspace":
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
    if alphabet == "##":
        return token[len(prefix) :].encode() if token.startswith(prefix) else b" " + token.encode()
    return token.encode()


def is_special(tokenizer: Tokenizer, token: str) -> bool:
    return bool(tokenizer.added[token].get("special")) or token in tokenizer.named.values()


def by_surface(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Text -> token; of several tokens for one text, the first that is not a byte token such as <0x41>."""
    tokens = {number: token for token, number in tokenizer.vocabulary.items()}
    found: dict[bytes, int] = {}
    plain: set[bytes] = set()
    for number, text in sorted(surfaces(tokenizer).items()):
        is_byte = tokenizer.alphabet == "metaspace" and _BYTE.fullmatch(tokens[number]) is not None
        if text not in found or (text not in plain and not is_byte):
            found[text] = number
        if not is_byte:
            plain.add(text)
    return found


def same_tokens(ours: Tokenizer, theirs: Tokenizer) -> dict[int, int]:
    """id in `theirs` -> id in `ours` of the same token: same text, or special with the same name or role."""
    known = by_surface(ours)
    matched = {number: known[text] for number, text in surfaces(theirs).items() if text in known}
    roles = _roles(ours)
    for token in theirs.added:
        number = theirs.vocabulary[token]
        if number in matched or not is_special(theirs, token):
            continue
        if token in ours.added:
            matched[number] = ours.vocabulary[token]
            continue
        for role, name in theirs.named.items():
            if name == token and role in roles:
                matched[number] = roles[role]
                break
    return matched


def _roles(tokenizer: Tokenizer) -> Mapping[str, int]:
    return {role: tokenizer.vocabulary[name] for role, name in tokenizer.named.items() if name in tokenizer.vocabulary}
