"""build_plan: recipe + headers -> Plan. Every problem is collected before anything is said."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from merge.checkpoint import Checkpoint
from merge.checkpoint.side_files import module_folders
from merge.errors import Problem, RecipeError
from merge.findings.model_pass import whole_models
from merge.jobs.adapters import build_adapter_plan
from merge.jobs.alignment.plan import align_targets
from merge.jobs.side_files import side_files
from merge.jobs.stacks.towers import lay_out_targets
from merge.jobs.stacks.upscale import upscaled
from merge.jobs.vocabulary.plan import plan_vocabulary
from merge.jobs.vocabulary.rows import Vocabulary
from merge.jobs.vocabulary.tokenizers import check_adapters, check_tokenizers, copied_files
from merge.methods import Method, get_method
from merge.output.shards import index_text, lay_out
from merge.plan import COPY, Finding, Plan, Step
from merge.planning.donors import donor_notes
from merge.planning.inputs import Inputs
from merge.planning.kind import are_adapters
from merge.planning.same_architecture import different_architectures
from merge.planning.steps import StepBuilder
from merge.planning.targets import Layout
from merge.recipe.model import Recipe

SHARD_BYTES = 5_000_000_000


def build_plan(
    recipe: Recipe,
    *,
    shard_bytes: int = SHARD_BYTES,
    known: Mapping[str, Checkpoint] | None = None,
    vocabulary_of: Callable[[Recipe, Inputs, list[Problem]], Vocabulary | None] = plan_vocabulary,
) -> Plan:
    """Makes the plan of a recipe from config files and tensor headers.

    Args:
        shard_bytes: most bytes of tensors in an output file.
        known: results of a pipeline's earlier stages, by the path of their references; see merge.jobs.pipelines.plan.
        vocabulary_of: chooses the output's vocabulary and arranges the inputs' rows by it.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if a model cannot be opened.
    """
    if recipe.mixture is not None:
        from merge.jobs.mixtures.plan import build_mixture

        return build_mixture(recipe, functools.partial(build_plan, shard_bytes=shard_bytes), shard_bytes=shard_bytes)
    method = get_method(recipe.merge_method)
    assert method is not None, recipe.merge_method  # the recipe was checked against the registry
    if are_adapters(recipe.models, recipe.base_model):
        return build_adapter_plan(recipe, method, recipe.name or default_name(recipe))
    inputs = Inputs(recipe, known)
    problems = list(different_architectures(recipe, inputs))
    if problems:
        raise RecipeError(problems)  # anything else would be said of every tensor
    recipe = upscaled(recipe, inputs, problems)
    vocabulary = vocabulary_of(recipe, inputs, problems)
    layout = Layout(()) if problems else lay_out_targets(recipe, inputs, problems)
    findings: tuple[Finding, ...] = ()
    if recipe.align:
        layout, findings = align_targets(recipe, inputs, layout, problems)
    builder = StepBuilder(recipe, inputs, problems)
    steps = [step for target in layout.targets if (step := builder.step(target)) is not None]
    builder.check_whole(steps)
    tokenizers = check_tokenizers(recipe, inputs) if vocabulary is None else vocabulary.memory
    check_adapters(inputs)
    inputs.notes += donor_notes(recipe, inputs)
    copied = copied_files(recipe, inputs, vocabulary, problems)
    if problems:
        raise RecipeError(problems)
    modules = dict.fromkeys(folder for model in inputs.all for folder in module_folders(model.checkpoint.path))
    placed, shards = lay_out(steps, shard_bytes, modules=tuple(modules))
    name = recipe.name or default_name(recipe)
    return Plan(
        name=name,
        method=method.name,
        seed=recipe.seed,
        models=tuple(model.source_model() for model in inputs.all),
        base_model=None if recipe.base_model is None else inputs.place(recipe.base_model),
        steps=placed,
        shards=shards,
        side_files=side_files(
            recipe, name, method, inputs, layout, placed, index_text(placed, shards), vocabulary, copied
        ),  # adds notes
        allow=recipe.allow,
        compat=recipe.compat,
        tokenizers_held=tokenizers.held,
        tokenizers_peak=tokenizers.peak,
        notes=(*recipe.notes, *inputs.notes, *builder.notes()),
        recipe_text=recipe.text,
        statistics_files=builder.statistics_files(),
        method_origin=method.origin,
        findings=(*findings, *whole_models(placed)),
        other_origins=_other_origins(placed, method),
    )


def _other_origins(steps: Sequence[Step], method: Method) -> dict[str, str]:
    """Where the methods of single slices come from, as far as they are not this package's."""
    names = dict.fromkeys(step.method for step in steps if step.method not in (COPY, method.name))
    found = {name: get_method(name) for name in names}
    return {name: other.origin for name, other in found.items() if other is not None and other.origin}


def default_name(recipe: Recipe) -> str:
    if recipe.file is None:
        return "merge"
    return recipe.file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0].strip(".") or "merge"
