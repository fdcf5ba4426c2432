"""`merge convert`: one model in another dtype, other shards, or another format, as an ordinary plan."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from merge.adapters.files import refuse_alone
from merge.checkpoint.side_files import MODULES
from merge.dtypes import torch_name
from merge.errors import UsageError
from merge.jobs.build import SHARD_BYTES, build_plan
from merge.jsontext import parse_json
from merge.output.task import task_of
from merge.plan import Derived, Plan, SideFile, TensorRef
from merge.planning.resolve import made_recipe, reference
from merge.recipe.fields import stored_dtype
from merge.recipe.model import Recipe, Source


def convert_plan(
    model: str,
    dtype: str | None = None,
    *,
    dequantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    allow: Sequence[str] = (),
) -> Plan:
    """A plan that copies a model's tensors, float ones in another dtype; the run notes what the rounding did.

    Args:
        model: a directory or a hub id, in safetensors, torch pickles or a quantised format that is read.
        dtype: any name that a recipe may give; None keeps each tensor's own, and of quantised ones takes that of the
            format's values. Integers are kept in any case.
        dequantize: the model has to be quantised. It is written as plain numbers in any case.
        allow: leniencies, as in a recipe.

    Raises:
        UsageError: an unknown dtype, or nothing to dequantize.
        RecipeError, CheckpointError: see build_plan.
    """
    if os.path.isdir(model):
        refuse_alone(os.path.abspath(model))
    name = os.path.basename(os.path.abspath(model.split("@")[0])) or "model"
    recipe = Recipe(
        "passthrough",
        (Source(reference(model)),),
        name=name + (f"-{dtype}" if dtype else ""),
        dtype=None if dtype is None else stored_dtype(dtype),
        allow=tuple(allow),
    )
    plan = build_plan(made_recipe(recipe), shard_bytes=shard_bytes)
    if dequantize and not any(_is_decoded(ref) for step in plan.steps for ref in step.sources):
        raise UsageError(f"{model}: --dequantize: none of its weights is quantised. Leave --dequantize out to copy it.")
    texts = {side.name: side.text for side in plan.side_files}
    task = task_of(parse_json(texts["config.json"] or "{}"), embeds=MODULES in texts)
    files = tuple(
        SideFile(side.name, text=_card(plan, task)) if side.name == "README.md" else side for side in plan.side_files
    )
    return dataclasses.replace(plan, side_files=files, notes_rounding=True)


def _is_decoded(ref: TensorRef) -> bool:
    return isinstance(ref, Derived) and (ref.how == "decoded" or any(_is_decoded(each) for each in ref.inputs))


def _card(plan: Plan, task: str | None) -> str:
    (model,) = plan.models
    hub = [f"base_model: {json.dumps(model.ref.split('@')[0])}"] if model.revision is not None else []
    dtypes = ", ".join(dict.fromkeys(torch_name(step.dtype) for step in plan.steps))
    lines = [
        *("---", "library_name: transformers", *([f"pipeline_tag: {task}"] if task else []), *hub, "---", ""),
        *(f"# {plan.name}", ""),
        f"The weights of {model.ref}, written by Merge Workbench as {dtypes}.",
        "",
        "`merge_manifest.json` has the digests of every tensor, and what rounding changed; `merge verify` checks them.",
        "",
    ]
    return "\n".join(lines)
