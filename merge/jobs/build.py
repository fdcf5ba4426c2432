"""build_plan: recipe + headers -> Plan, as a fold over planners that return a value, problems and notes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from merge.checkpoint import Checkpoint
from merge.checkpoint.side_files import module_folders
from merge.errors import Problem
from merge.findings.model_pass import whole_models
from merge.garbage import no_collection
from merge.jobs.adapters import build_adapter_plan
from merge.jobs.alignment.plan import align_targets
from merge.jobs.side_files import side_files
from merge.jobs.stacks.towers import lay_out_targets
from merge.jobs.stacks.upscale import upscaled
from merge.jobs.vocabulary.plan import plan_vocabulary
from merge.jobs.vocabulary.rows import Vocabulary
from merge.jobs.vocabulary.tokenizers import adapter_notes, check_tokenizers, copied_files
from merge.methods import Method, get_method, known_method
from merge.output.shards import index_text, lay_out
from merge.plan import COPY, Finding, Plan, Step
from merge.planned import Planned, Said
from merge.planning.donors import donor_notes
from merge.planning.inputs import Inputs, open_inputs
from merge.planning.kind import are_adapters
from merge.planning.same_architecture import different_architectures
from merge.planning.steps import build_steps
from merge.planning.targets import Layout
from merge.recipe.model import Recipe

SHARD_BYTES = 5_000_000_000


@no_collection()
def build_plan(
    recipe: Recipe,
    *,
    shard_bytes: int = SHARD_BYTES,
    known: Mapping[str, Checkpoint] | None = None,
    vocabulary_of: Callable[[Recipe, Inputs], Planned[tuple[Vocabulary | None, Inputs]]] = plan_vocabulary,
) -> Plan:
    """Makes the plan of a recipe from config files and tensor headers.

    Args:
        shard_bytes: most bytes of tensors in an output file.
        known: results of a pipeline's earlier stages, by the path of their references; see merge.jobs.pipelines.plan.
        vocabulary_of: chooses the output's vocabulary, and returns the inputs with their rows in its order.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if a model cannot be opened.
    """
    if recipe.mixture is not None:
        from merge.jobs.mixtures.plan import build_mixture

        return build_mixture(recipe, functools.partial(build_plan, shard_bytes=shard_bytes), shard_bytes=shard_bytes)
    method = known_method(recipe.merge_method)
    if are_adapters(recipe.models, recipe.base_model):
        return build_adapter_plan(recipe, method, recipe.name or default_name(recipe))
    said = Said()
    inputs = said.take(open_inputs(recipe, known))
    said.raise_if_any(different_architectures(recipe, inputs))  # otherwise there would be a problem for every tensor
    recipe = said.take(upscaled(recipe, inputs))
    vocabulary, inputs = said.take(vocabulary_of(recipe, inputs))
    layout = Layout(())
    findings: tuple[Finding, ...] = ()
    if not said.problems:
        layout = said.take(lay_out_targets(recipe, inputs))
        if recipe.align:
            layout, findings = said.take(align_targets(recipe, inputs, layout))
    made = said.take(build_steps(recipe, inputs, layout.targets))
    if not made.steps and not said.problems:
        said.problems.append(Problem("the recipe produces no tensors", recipe.file))
    memory = said.take(check_tokenizers(recipe, inputs)) if vocabulary is None else vocabulary.memory
    said.notes += [*adapter_notes(inputs), *donor_notes(recipe, inputs)]
    copied = said.take(copied_files(recipe, inputs, vocabulary))
    said.raise_if_any()
    modules = dict.fromkeys(folder for model in inputs.all for folder in module_folders(model.checkpoint.path))
    steps, shards = lay_out(made.steps, shard_bytes, modules=tuple(modules))
    name = recipe.name or default_name(recipe)
    index = index_text(steps, shards)
    files = said.take(side_files(recipe, name, method, inputs, layout, steps, index, vocabulary, copied))
    return Plan(
        name=name,
        method=method.name,
        seed=recipe.seed,
        models=tuple(model.source_model() for model in inputs.all),
        base_model=None if recipe.base_model is None else inputs.place(recipe.base_model),
        steps=steps,
        shards=shards,
        side_files=files,
        allow=recipe.allow,
        compat=recipe.compat,
        tokenizers_held=memory.held,
        tokenizers_peak=memory.peak,
        notes=(*recipe.notes, *said.notes, *made.leniencies),
        recipe_text=recipe.text,
        statistics_files=made.statistics_files,
        method_origin=method.origin,
        findings=(*findings, *whole_models(steps)),
        other_origins=_other_origins(steps, method),
    )


def _other_origins(steps: Sequence[Step], method: Method) -> dict[str, str]:
    """Origins of the methods of single slices, for methods from outside this package."""
    names = dict.fromkeys(step.method for step in steps if step.method not in (COPY, method.name))
    found = {name: get_method(name) for name in names}
    return {name: other.origin for name, other in found.items() if other is not None and other.origin}


def default_name(recipe: Recipe) -> str:
    if recipe.file is None:
        return "merge"
    return recipe.file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0].strip(".") or "merge"
