"""Plans a pipeline: decides which stages are computed while they are read, and which are written first.

A stage that is streamed is a checkpoint of derived tensors (merge/sources/stage.py): its sources, method and numbers go
into the plans of those that use it, and nothing of it is ever on the disk. A stage that is written is planned with all
its offsets before it exists, so that everything that is wrong with the whole pipeline is known before a weight is read.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from merge.checkpoint import Checkpoint, open_checkpoint
from merge.errors import Problem, RecipeError
from merge.jobs.build import SHARD_BYTES, build_plan, default_name
from merge.jobs.side_files import RECIPE_FILE
from merge.jsontext import parse_json
from merge.methods import get_method
from merge.output.identity import plan_digest
from merge.output.shards import INDEX
from merge.plan import Plan, SourceFile, Step, Stored, TensorRef
from merge.random_keys import random_key
from merge.recipe.model import ModelRef
from merge.recipe.pipeline import Pipeline, Stage
from merge.recipe.references import STAGE
from merge.schema.document import place
from merge.sources.stage import stage_tensor

How = Literal["streamed", "written", "result"]
_CONFIG = "config.json"
_MOST_TIMES = 4  # times that one stage is computed, if several others are made from it
_OWN_FILES = frozenset({"README.md", _CONFIG, RECIPE_FILE, INDEX})


@dataclass(frozen=True)
class StagePlan:
    """How one stage is carried out.

    Attributes:
        how: "streamed" into those that use it; "written" first, as they need it whole; or a "result" of the pipeline.
        directory: where it is written; None if it is streamed.
        reason: why it cannot be streamed; "" if it is, or need not be.
    """

    name: str
    plan: Plan
    uses: tuple[str, ...]
    how: How
    directory: Path | None
    reason: str = ""


@dataclass
class PipelinePlanner:
    """Plans one stage after another; `ready` has those that later ones can read.

    Args:
        out: directory of the last stage; other results, which are stages that nothing uses, go beside it.
        stages_dir: directory of the stages that others need; default OUT.stages.
        keep: write every stage, for later runs to use.
    """

    pipeline: Pipeline
    out: Path | None = None
    stages_dir: Path | None = None
    keep: bool = False
    shard_bytes: int = SHARD_BYTES
    ready: dict[str, Checkpoint] = field(default_factory=dict)
    _done: dict[str, StagePlan] = field(default_factory=dict)

    def plan(self, stage: Stage) -> StagePlan:
        """Plans one stage after those that it uses, and makes it available to later ones.

        Raises:
            RecipeError, CheckpointError: see build_plan.
        """
        is_last = stage is self.pipeline.stages[-1]
        plan = build_plan(stage.recipe, shard_bytes=self.shard_bytes, known=self.ready)
        plan = replace(plan, stages=tuple(self._embedded(stage)))
        if is_last:
            plan = replace(plan, notes=(*self.pipeline.notes, *plan.notes))
        name = stage.name or plan.name
        if self.pipeline.is_used(stage) and all(side.name != _CONFIG for side in plan.side_files):
            message = f'the result of "{name}" is not a model (it has no config.json), so no document can merge it'
            raise RecipeError(Problem(message, place(stage.recipe.file, stage.line)))
        how: How = "written" if self.pipeline.is_used(stage) else "result"
        reason = "" if how == "result" else self._obstacle(stage, plan)
        if how == "written" and not reason:
            how = "streamed"
        found = StagePlan(name, plan, stage.uses, how, self._directory(name, how, is_last), reason)
        if how == "streamed":
            self.ready[STAGE + name] = streamed(found)
        elif how == "written":
            self.ready[STAGE + name] = _to_be_written(found)
        self._done[name] = found
        return found

    @functools.cached_property
    def planned(self) -> tuple[StagePlan, ...]:
        """Every stage; problems of all of them are collected as far as one does not follow from another.

        Raises:
            RecipeError, CheckpointError: see build_plan.
        """
        plans: list[StagePlan] = []
        problems: list[Problem] = []
        lost: set[str | None] = set()
        for stage in self.pipeline.stages:
            if lost.intersection(stage.uses):
                lost.add(stage.name)
                continue
            try:
                plans.append(self.plan(stage))
            except RecipeError as error:
                if len(self.pipeline.stages) == 1:
                    raise
                problems += [_in_stage(problem, stage) for problem in error.problems]
                lost.add(stage.name)
        if problems:
            raise RecipeError(problems)
        return tuple(plans)

    def current(self, stage: Stage, planned: StagePlan) -> StagePlan:
        """The stage's plan, made again if stages that it reads have been written since: it then reads them there."""
        return self.plan(stage) if any(self._done[name].how == "written" for name in self._needed(stage)) else planned

    def written(self, stage: StagePlan) -> None:
        """Makes later stages read this one from its directory."""
        assert stage.directory is not None
        found = open_checkpoint(ModelRef(stage.name, os.path.abspath(stage.directory)))
        files = tuple(replace(file, made_from=plan_digest(stage.plan)) for file in found.files)
        self.ready[STAGE + stage.name] = replace(found, ref=ModelRef(stage.name, STAGE + stage.name), files=files)

    def _directory(self, name: str, how: How, is_last: bool) -> Path | None:
        out = self.out or Path("merged") / self._name_of_result()
        if how == "streamed":
            return None
        if how == "written":
            return (self.stages_dir or stages_dir_of(out)) / name
        return out if is_last else out.absolute().parent / name

    def _name_of_result(self) -> str:
        last = self.pipeline.stages[-1]
        return last.name or default_name(last.recipe)

    def _embedded(self, stage: Stage) -> Iterator[Plan]:
        """The plans of all stages that this one is made from, in the pipeline's order, without their files."""
        needed = self._needed(stage)
        for name, done in self._done.items():
            if name in needed:
                steps = done.plan.steps if done.how == "streamed" else ()
                yield replace(done.plan, steps=steps, shards=(), side_files=(), stages=())

    def _needed(self, stage: Stage) -> set[str]:
        """The names of all stages that this one is made from."""
        needed: set[str] = set()
        todo = list(stage.uses)
        while todo:
            name = todo.pop()
            needed.add(name)
            todo += self._done[name].uses
        return needed

    def _obstacle(self, stage: Stage, plan: Plan) -> str:
        """Why a stage that others use cannot be computed while they read it; "" if it can."""
        if self.keep:
            return "it is to be kept"
        for other in self.pipeline.stages:
            if stage.name in other.uses and other.recipe.align is not None:
                return f"{other.name or 'the result'} aligns it"
        times = _times(self.pipeline, stage)
        if times > 1 and any(
            (method := get_method(step.method)) and method.locality == "tensor" for step in plan.steps
        ):
            return f"{plan.method} goes over each tensor several times, and {times} others are made from it"
        if times > _MOST_TIMES:
            return f"{times} others are made from it"
        return not_by_blocks(plan)


def _in_stage(problem: Problem, stage: Stage) -> Problem:
    """A problem that names a tensor and no line, with the stage's name."""
    if problem.where and stage.recipe.file and problem.where.startswith(stage.recipe.file):
        return problem
    return replace(problem, where=": ".join(filter(None, (stage.name or "the last document", problem.where))))


def stages_dir_of(out: Path) -> Path:
    """The directory of the stages that others need."""
    return out.with_name(out.name + ".stages")


def _times(pipeline: Pipeline, stage: Stage) -> int:
    """How often a stage is computed at most: the number of paths from it to a result."""
    users = [other for other in pipeline.stages if stage.name in other.uses]
    return sum(_times(pipeline, user) for user in users) if users else 1


def not_by_blocks(plan: Plan) -> str:
    """Why a plan needs whole tensors, or more than kernels; "" if it does not."""
    if plan.findings:
        return plan.findings[0].what
    if not _is_plain(plan, _PLAN_FIELDS) or not all(_is_plain(step, _STEP_FIELDS) for step in plan.steps):
        return "it needs more than a kernel for each tensor"
    if plan.method_origin:
        return f"{plan.method} is not of this package"
    copied = {os.path.dirname(side.source) for side in plan.side_files if side.source and "/" not in side.name}
    if len(copied) > 1 or any(side.text is not None and side.name not in _OWN_FILES for side in plan.side_files):
        return "its tokenizer is a new one"
    for step in plan.steps:
        if step.kind == "copy":
            if len(step.inputs) > 1:
                return f"{step.name} must be equal in all its models"
            continue
        method = get_method(step.method)
        if method is None or method.fused is None or step.statistics:
            return f"{step.method} needs whole tensors"
        if "F64" in (step.dtype, *(source.dtype for source in step.sources)):
            return f"{step.name} is float64"
    return ""


# Fields that streaming supports; a plan with any other is carried out by the engine.
_PLAN_FIELDS = frozenset(
    ("name", "method", "seed", "models", "base_model", "steps", "shards", "side_files", "allow", "notes")
).union(
    (
        "recipe_text",
        "statistics_files",
        "method_origin",
        "findings",
        "stages",
        "compat",
        "tokenizers_held",
        "tokenizers_peak",
    )
)
_STEP_FIELDS = frozenset(
    ("name", "shape", "dtype", "file", "offset", "method", "inputs", "models", "base", "base_model")
).union(("parameters", "statistics"))


def _is_plain(part: Plan | Step, known: frozenset[str]) -> bool:
    """Whether every other field has its default."""
    for entry in fields(part):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.name not in known and getattr(part, entry.name) != default:
            return False
    return True


def streamed(stage: StagePlan) -> Checkpoint:
    """The stage's result, whose tensors are computed while they are read."""
    plan = stage.plan
    tensors = {step.name: _source(plan, step) for step in plan.steps}
    return _checkpoint(stage, tensors, ())


def _source(plan: Plan, step: Step) -> TensorRef:
    if step.kind == "copy":
        return step.inputs[0].named(step.name)
    method = get_method(step.method)
    random = method is not None and method.random
    keys = [random_key(plan.seed, step.name, place) for place in range(len(step.inputs))] if random else []
    owners = step.models if step.base is None or step.base_model is None else (step.base_model, *step.models)
    return stage_tensor(step, plan.name, [plan.models[i].ref for i in owners], plan.allow, keys)


def _to_be_written(stage: StagePlan) -> Checkpoint:
    """The checkpoint that the stage will be; only its files' times are unknown."""
    plan, folder = stage.plan, os.path.abspath(stage.directory or "")
    tensors = {
        step.name: Stored(step.name, step.dtype, step.shape, f"{folder}/{step.file}", step.offset)
        for step in plan.steps
    }
    made_from = plan_digest(plan)
    files = tuple(SourceFile(f"{folder}/{shard.file}", shard.size, 0, 0, 0, 0, made_from) for shard in plan.shards)
    return _checkpoint(stage, tensors, files)


def _checkpoint(stage: StagePlan, tensors: Mapping[str, TensorRef], files: tuple[SourceFile, ...]) -> Checkpoint:
    plan = stage.plan
    config = next(side.text for side in plan.side_files if side.name == _CONFIG)
    copied = next((side for side in plan.side_files if side.source is not None), None)
    return Checkpoint(
        ref=ModelRef(stage.name, STAGE + stage.name),
        path=plan.models[0].path if copied is None else str(copied.source).removesuffix(f"/{copied.name}"),
        revision=None,
        config=parse_json(config or "{}"),
        tensors=dict(tensors),
        files=files,
        notes=(),
    )
