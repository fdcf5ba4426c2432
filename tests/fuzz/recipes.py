"""Recipes of models, slices, modules and tokenizers: as trees, and as YAML texts."""

from __future__ import annotations

import random
from typing import Any

import yaml
from bad_inputs.room import Arguments

from fuzz import damage
from fuzz.place import LINEAR, Place, a_run

SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}
"""
TIES = """\
merge_method: ties
base_model: a
models:
  - model: b
    parameters:
      weight: [{filter: mlp, value: 1}, {value: [0, 1]}]
      density: 0.5
parameters: {lambda: 0.9, trim: model, rescale: l1, int8_mask: true}
"""
DARE = """\
merge_method: dare_ties
base_model: {model: {path: a}}
models: [{model: b, parameters: {weight: 1, density: 0.3}}]
"""
MODULES = "merge_method: linear\nmodules: {text: {models: [{model: a, parameters: {weight: 1}}]}}\nbase_model: a\n"
SOUND = (
    LINEAR + "parameters: {normalize: true}\ndtype: float32\nseed: 3\nallow: [nonfinite]\n",
    SLICES + "out_dtype: float16\ntokenizer_source: base\n",
    TIES,
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 0.5, 1]}\nname: x\n",
    DARE,
    MODULES,
    "merge_method: passthrough\nmodels: [{model: b}]\nupscale: {layers: 3}\n",
    "models: [{model: b}]\nupscale: {insert_every: 1, zero_init: true}\n",
    LINEAR + "align: permutation\nbase_model: a\n",
    LINEAR + 'tokenizer: {source: union, tokens: {x: {source: a}}, pad_to_multiple_of: 8}\nchat_template: "{{ m }}"\n',
    "merge_method: tsv\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n",
)
PIECES = (
    *(
        "&x",
        "*x",
        "<<: *x\n",
        "!!python/object:os.system",
        "!!float abc",
        "!!int ''",
        "!!binary YQ==",
        "!!set {a}",
        "? a\n",
    ),
    *(
        "1:2:3",
        "1:" * 2000 + "1",
        "0x" + "f" * 500,
        "1" * 5000,
        ".inf",
        "2001-01-01",
        "~",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
    ),
    *(
        "{" * 100,
        "[" * 100,
        "a: " * 40,
        "'",
        '"',
        "|\n",
        "\t",
        "#",
        ": ",
        "- ",
        "\x00",
        "é",
        "\u2028",
        "\\ud800",
        "@",
        "`",
    ),
)


class Format:
    texts = SOUND

    def set_up(self, place: Place) -> Arguments:
        place.pair()
        return place.recipe(self.texts[0])

    def damage(self, place: Place, dice: random.Random) -> Arguments:
        place.put("r.yaml", damaged_yaml(dice.choice(self.texts), dice))
        return a_run(dice)


def damaged_yaml(text: str, dice: random.Random) -> bytes:
    match dice.randrange(5):
        case 0:
            return damage.in_bytes(text.encode(), dice)
        case 1:
            for _ in range(dice.randint(1, 3)):
                place = dice.randrange(len(text) + 1)
                text = text[:place] + dice.choice(PIECES) + text[place:]
            return text.encode("utf-8", "surrogatepass")
        case 2 if damage.chance(dice, 0.3):
            return flood(text, dice)
        case _:
            documents = list(yaml.load_all(text.replace("!function ", ""), yaml.CSafeLoader))
            if len(documents) > 1:
                documents = damage.in_tree(documents, dice)
                return b"---\n".join(map(written, documents if isinstance(documents, list) else [documents]))
            return written(damage.in_tree(documents[0], dice))


def written(tree: Any) -> bytes:
    """As YAML; what YAML cannot hold is left as Python shows it."""
    try:
        return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True, width=10_000).encode()
    except (ValueError, yaml.YAMLError, RecursionError):
        return str(tree).encode("utf-8", "replace")


def flood(text: str, dice: random.Random) -> bytes:
    """Texts that are short for what they become."""
    many = dice.choice((30, 3000, 60_000))
    bomb = "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("xabcde", "abcdef", strict=True)
    )
    texts = (
        text + "".join(f"densitu{i}: 1\n" for i in range(min(many, 30_000))),
        "x: &x [1]\n" + bomb + text,
        "merge_method: linear\nmodels:\n" + "- {model: a, parameters: {weight: 1}}\n" * min(many, 3000),
        "merge_method: linear\nmodels:\n" + "- {model: zz, parameters: {wait: 1}}\n" * min(many, 10_000),
        f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: [{'1, ' * many}]}}}}]\n",
        f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1{':1' * many}}}}}]\n",
        f"merge_method: linear\nmodels: [{{model: {'a' * many}, parameters: {{weight: 1}}}}]\n",
        f"merge_method: {'x' * many}\n{text}",
        f"{'k' * many}: 1\n{text}",
        "merge_method: passthrough\nslices:\n" + "- sources: [{model: a, layer_range: [0, 1]}]\n" * min(many, 300),
        f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: [0, {10**18}]}}]}}]\n",
        "merge_method: passthrough\nmodels: [{model: a}]\nupscale: {layers: 1000000000}\n",
        text + "---\n" * many,
        text + "".join(f"---\n{text}name: n{i}\n" for i in range(min(many, 150))),
        "modules: {" + "m: {models: [" * 30,
        "#" * many + "\n" + text,
    )
    return dice.choice(texts).encode()
