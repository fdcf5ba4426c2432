"""YAML to Draft: strict, and all problems are reported together, with file and line.

A Draft is made from the text alone; merge/planning turns it into a Recipe.

reader.py      reads nodes with the reader of merge/schema
keys.py        the keys of each level, with values and help
names.py       messages for unknown keys, parameters and methods
references.py  directory, org/name@revision, model+adapter, the name of an earlier document; looks at the disk
mentioned.py   every model that a recipe names
pipeline.py    several documents; later ones use earlier ones
settings.py    scalars, gradients, conditions: held against the method's signature, and -> one number
build.py       a text -> Draft: one function for each level of the schema
mixture.py     recipes with "experts": another schema
check.py       what needs more than one place: models, base, required parameters
text.py        a recipe made of values -> its text
model.py       the dataclasses
"""

from __future__ import annotations

from merge.recipe.build import Draft, draft_of
from merge.recipe.model import (
    ALLOW,
    Conditional,
    ModelRef,
    Module,
    Recipe,
    Scalar,
    Setting,
    Settings,
    Slice,
    Source,
)
from merge.recipe.references import parse_reference
from merge.recipe.settings import evaluate, resolve

__all__ = [
    "ALLOW",
    "Conditional",
    "Draft",
    "ModelRef",
    "Module",
    "Recipe",
    "Scalar",
    "Setting",
    "Settings",
    "Slice",
    "Source",
    "draft_of",
    "evaluate",
    "parse_reference",
    "resolve",
]
