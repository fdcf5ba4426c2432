"""Tokenizers: tokenizer.json of four kinds, tokenizer_config.json, and what else holds tokens or templates."""

from __future__ import annotations

import json
import random
from typing import Any

from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import LINEAR, Place

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
_SAME: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "NFC"},
    "post_processor": None,
    "added_tokens": [
        {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for id_, content in ((0, "<unk>"), (1, "</s>"))
    ],
}
_VOCABULARY = {token: id_ for id_, token in enumerate(["<unk>", "</s>", *LETTERS, "ab", "cd"])}
SOUND: dict[str, dict[str, Any]] = {
    "BPE": _SAME
    | {
        "model": {"type": "BPE", "vocab": _VOCABULARY, "merges": [["a", "b"], ["c", "d"]], "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    },
    "Unigram": _SAME
    | {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[token, -1.0 * i] for token, i in _VOCABULARY.items()]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    },
    "WordPiece": _SAME
    | {
        "model": {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "vocab": _VOCABULARY}
        | {"max_input_chars_per_word": 100},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
    "WordLevel": _SAME
    | {
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": _VOCABULARY},
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": None,
    },
}
SPLITS = ("(a+)+$", "((a|aa)+x?)+b", "[", "", "\\p{L}+", "(?i:'s|'t)|\\s+", "a{1,1000}{1,1000}", "(?!a)b*")
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "eos_token": {"content": "</s>"},
    "model_max_length": 64,
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "1": {"content": "</s>", "special": True}},
}
OTHERS: dict[str, Any] = {
    "tokenizer_config.json": CONFIG,
    "added_tokens.json": {"<x>": 30, "<y>": 31},
    "special_tokens_map.json": {"eos_token": "</s>", "unk_token": {"content": "<unk>"}},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "generation_config.json": {"eos_token_id": 1},
}
RECIPES = (
    LINEAR + "tokenizer_source: union\n",
    LINEAR + "tokenizer_source: base\n",
    LINEAR + "tokenizer_source: union\nchat_template: auto\n",
    LINEAR + "tokenizer:\n  source: union\n  tokens: {<new>: {source: a, force: true}, ab: {source: b}}\n",
    LINEAR + "tokenizer: {source: a, tokens: {a: {source: {kind: model_token, model: b, token_id: 4}}}}\n",
    LINEAR,
)


class Format:
    def set_up(self, place: Place) -> Arguments:
        place.pair(layers=1)
        for model in "ab":
            (place.path / model / "tokenizer.json").write_text(json.dumps(SOUND["BPE"]))
            (place.path / model / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        return place.recipe(RECIPES[0])

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        place.put("r.yaml", dice.choice(RECIPES))
        kind = dice.choice((*SOUND, "BPE", "BPE"))
        tree = json.loads(json.dumps(SOUND[kind]))
        if damage.chance(dice, 0.3):
            place.put("a/tokenizer.json", json.dumps(tree))  # the same kind, so that they can be united
        match dice.randrange(6):
            case 0:
                place.put("b/tokenizer.json", damage.json_text(tree, dice))
            case 1:
                tree["model"] = damage.in_tree(tree["model"], dice)
            case 2:
                self._renumber(tree, dice)
            case 3:
                key = dice.choice(("normalizer", "pre_tokenizer", "decoder", "post_processor"))
                split = {"type": "Split", "pattern": {"Regex": dice.choice(SPLITS)}, "behavior": "Isolated"}
                part = dice.choice((split | {"invert": False}, tree["pre_tokenizer"], damage.value(dice)))
                for _ in range(dice.choice((0, 1, 40, 70))):
                    part = {"type": "Sequence", dice.choice(("pretokenizers", "normalizers", "decoders")): [part]}
                tree[key] = part
            case _:
                name = dice.choice(list(OTHERS))
                place.put(f"b/{name}", damage.json_text(OTHERS[name], dice))
        if damage.chance(dice, 0.9):
            place.put("b/tokenizer.json", json.dumps(tree).encode("utf-8", "surrogatepass"))
        run = ["run", "r.yaml", "-o", "out", "--threads", "2", "--quiet"]
        plan = ["plan", "r.yaml"]
        return dice.choice((run, plan, plan, ["tokenizers", "a", "b"], ["transplant", "b", "a", "-o", "out"]))

    def _renumber(self, tree: Any, dice: random.Random) -> None:
        ids = (0, -1, 1, 31, 32, 10**6, 2**31 - 1, 2**31, 2**63, 10**100, 1.0, "3", None, True)
        vocabulary = tree["model"]["vocab"]
        for _ in range(dice.randint(1, 3)):
            entry = dice.choice(tree["added_tokens"])
            entry[dice.choice(("id", "content", "special"))] = dice.choice((*ids, *damage.TEXTS))
            if isinstance(vocabulary, dict):
                vocabulary[str(dice.choice((*vocabulary, *damage.TEXTS)))] = dice.choice(ids)
            else:
                dice.choice(vocabulary)[:] = [dice.choice(damage.TEXTS), damage.value(dice)]
        if damage.chance(dice, 0.2):
            tree["added_tokens"] += [{**tree["added_tokens"][0], "id": i, "content": f"<{i}>"} for i in range(3000)]
