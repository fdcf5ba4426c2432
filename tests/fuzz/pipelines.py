"""Recipes of several documents."""

from __future__ import annotations

from fuzz import recipes
from fuzz.place import LINEAR

SOUND = (
    LINEAR + "name: one\n---\nmerge_method: passthrough\nmodels: [{model: one}]\n",
    recipes.TIES + "name: first\n---\nmerge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: first}]\n"
    "parameters: {t: 0.5}\nname: last\n",
    LINEAR + "name: one\n---\n" + LINEAR + "name: two\n---\n"
    "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 1}}]\n",
)


class Format(recipes.Format):
    texts = SOUND
