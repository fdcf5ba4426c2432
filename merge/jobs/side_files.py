"""Plans the small files of an output: config, card, recipe, index, and files copied from the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from merge.architecture import is_embedding
from merge.checkpoint.side_files import MODULES
from merge.dtypes import DTYPES, torch_name
from merge.jobs.vocabulary.rows import Vocabulary
from merge.methods import Method
from merge.output.card import model_card
from merge.output.config import output_config
from merge.output.heads import Parent, with_head
from merge.output.shards import INDEX
from merge.output.task import task_of
from merge.plan import SideFile, Step
from merge.planned import Planned, Said
from merge.planning.inputs import Inputs
from merge.planning.targets import Layout
from merge.recipe.model import Recipe

RECIPE_FILE = "merge_recipe.yaml"


def side_files(
    recipe: Recipe,
    name: str,
    method: Method,
    inputs: Inputs,
    layout: Layout,
    steps: Sequence[Step],
    index: str | None,
    vocabulary: Vocabulary | None,
    copied: Sequence[SideFile],
) -> Planned[tuple[SideFile, ...]]:
    said = Said()
    donor = inputs.donor
    bytes_of: Counter[str] = Counter()
    for step in steps:
        if DTYPES[step.dtype].is_float:
            bytes_of[step.dtype] += step.nbytes
    dtype = max(bytes_of, key=lambda key: bytes_of[key], default="F32")
    parents = [Parent(model.config, model.tensors) for model in inputs.all]
    headed = said.take(with_head(donor.config, parents, {step.name: step.shape for step in steps}))
    task = task_of(headed, embeds=any(file.name == MODULES for file in copied))
    adapted = headed if vocabulary is None else said.take(vocabulary.adapted(headed))
    config = output_config(
        adapted,
        dtype=torch_name(dtype),
        tie_flags=inputs.tie_flags,
        vocabulary=next((step.shape[0] for step in steps if is_embedding(step.name) and step.shape), None),
        stacks=layout.stacks,
    )
    models = [model.source_model() for model in inputs.all]
    base = None if recipe.base_model is None else inputs.place(recipe.base_model)
    made = {
        "README.md": model_card(recipe, name, method, models, base, (step.method for step in steps), task=task),
        "config.json": said.take(config),
        RECIPE_FILE: recipe.text,
    }
    if index is not None:
        made[INDEX] = index
    files = (
        *(file for file in copied if file.name not in made),
        *(SideFile(file, text=text) for file, text in made.items()),
    )
    return said.with_value(files)
