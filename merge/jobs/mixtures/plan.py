"""build_mixture: a recipe with experts -> Plan. Expert tensors are copies, or derived from one model.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): every MLP becomes a router and several MLPs. Everything
else is planned as a recipe of its own, of the base alone or of the experts merged (Branch-Train-MiX, Sukhbaatar et al.
2024, arXiv:2403.07816), and its steps are taken over.

layouts.py  the layouts and their configs
fit.py      whether the models fit
router.py   where the router's numbers come from
steps.py    the steps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import merge.output
from merge.dtypes import torch_name
from merge.errors import RecipeError
from merge.jobs.mixtures.config import moe_config
from merge.jobs.mixtures.fit import DEAD_NEURONS, EMBEDDING, HEAD, Dense, choose_layout
from merge.jobs.mixtures.router import Router
from merge.jobs.mixtures.steps import ExpertSteps
from merge.jobs.side_files import RECIPE_FILE
from merge.jsontext import parse_json
from merge.methods import known_method
from merge.moe_layouts import Counts
from merge.output.card import model_card
from merge.output.config import output_config
from merge.output.shards import INDEX, index_text, lay_out
from merge.output.task import task_of
from merge.plan import Experts, Plan, SideFile, Step
from merge.planning.inputs import open_inputs
from merge.recipe.model import Mixture, Recipe, Source


def build_mixture(recipe: Recipe, plan_rest: Callable[[Recipe], Plan], *, shard_bytes: int) -> Plan:
    """Makes the plan of a mixture of experts from config files and tensor headers.

    Args:
        plan_rest: plans everything but the experts, as a recipe of its own.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if a model cannot be opened.
    """
    mixture = recipe.mixture
    assert mixture is not None
    inputs = open_inputs(recipe).value  # the plan of the rest reports problems and notes of the models
    layout = choose_layout(recipe, mixture, inputs)
    rest = plan_rest(_rest(recipe, mixture))
    dense = Dense(recipe, mixture, inputs, layout, rest)
    router = Router(recipe, mixture, dense.base, layout, dense.n_layers)
    if router.problems:
        raise RecipeError(router.problems)
    placed, shards = lay_out(list(ExpertSteps(dense, router).all()), shard_bytes)
    of_files = [f"{model.ref.text}: {note}" for model in inputs.all for note in model.checkpoint.notes]
    return dataclasses.replace(
        rest,
        method=rest.method if rest.method_origin else "mixture",
        models=tuple(model.source_model() for model in inputs.all),
        base_model=0,
        steps=placed,
        shards=shards,
        side_files=_side_files(dense, rest.name, placed, index_text(placed, shards)),
        notes=tuple(dict.fromkeys((*rest.notes, *of_files, *dense.notes))),
        recipe_text=recipe.text,
        experts=_experts(dense, placed),
        findings=(*rest.findings, *((router.gates,) if router.gates else ())),
    )


def _rest(recipe: Recipe, mixture: Mixture) -> Recipe:
    """The recipe of everything but the experts: the base unchanged, or the experts merged."""
    assert recipe.base_model is not None
    if recipe.merge_method == "passthrough":
        return dataclasses.replace(recipe, mixture=None, models=(Source(recipe.base_model),), base_model=None)
    return dataclasses.replace(recipe, mixture=None, models=recipe.models[: len(mixture.experts)])


def _experts(dense: Dense, steps: Sequence[Step]) -> Experts:
    mixture = dense.mixture
    idle = len(mixture.experts) - mixture.experts_per_token
    return Experts(
        layout=dense.layout.title,
        n_experts=len(mixture.experts),
        n_shared=len(mixture.shared),
        per_token=mixture.experts_per_token,
        n_layers=dense.n_layers,
        active=sum(step.size for step in steps)
        - dense.n_layers * idle * 3 * dense.neurons * dense.config["hidden_size"],
    )


def _side_files(dense: Dense, name: str, steps: Sequence[Step], index: str | None) -> tuple[SideFile, ...]:
    shared = dense.neurons if dense.mixture.shared else DEAD_NEURONS
    n_experts, n_shared = len(dense.mixture.experts), len(dense.mixture.shared)
    counts = Counts(n_experts, n_shared, dense.mixture.experts_per_token, dense.neurons, shared)
    tied = not any(step.name == HEAD for step in steps)
    dtype = next(step.dtype for step in steps if step.name.endswith("gate.weight"))
    embedding = next(step for step in steps if step.name == EMBEDDING)
    config = output_config(
        moe_config(dense.layout, dense.config, counts),
        dtype=torch_name(dtype),
        tie_flags={"": tied},
        vocabulary=embedding.shape[0],
        stacks=(),
    ).value
    rest = known_method(dense.recipe.merge_method)
    method = dataclasses.replace(
        rest,
        name="mixture-of-experts",
        paper="Komatsuzaki et al. 2022, Sparse Upcycling, arXiv:2212.05055",
        formula=f"each MLP has {counts.n_experts} experts; a router weighs the best {counts.per_token} for each token",
    )
    models = [model.source_model() for model in dense.inputs.all]
    home = Path(merge.output.__path__[0])
    made = {
        "README.md": model_card(dense.recipe, name, method, models, 0, task=task_of(parse_json(config))),
        "config.json": config,
        RECIPE_FILE: dense.recipe.text,
        **{file: (home / file).read_text(encoding="utf-8") for file in dense.layout.files},
    }
    if index is not None:
        made[INDEX] = index
    keeper = dense.base.checkpoint
    copied = [SideFile.copy(file, f"{keeper.path}/{file}") for file in keeper.side_files() if file not in made]
    return (*copied, *(SideFile(file, text=text) for file, text in made.items()))
