"""build_plan: recipe + headers -> Plan. Every problem is collected before anything is said."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge.architecture import is_embedding, is_head
from merge.checkpoint import Checkpoint
from merge.dtypes import DTYPES, torch_name
from merge.errors import Problem, RecipeError
from merge.methods import Method, Parameter, get_method
from merge.methods.registry import StatisticsKind
from merge.output.card import model_card
from merge.output.config import output_config
from merge.output.shards import INDEX, index_text, lay_out
from merge.plan import Plan, SideFile, SourceFile, Step, TensorRef, Units
from merge.planners.adapter_inputs import refuse_models
from merge.planners.adapter_output import build_adapter_plan
from merge.planners.align import align_targets
from merge.planners.inputs import Inputs
from merge.planners.statistics import Statistics
from merge.planners.targets import Layout, Slot, Target
from merge.planners.token_rows import Vocabulary
from merge.planners.tokenizers import check_tokenizers, copied_files
from merge.planners.towers import lay_out_targets
from merge.planners.upscale import upscaled
from merge.planners.vocabularies import plan_vocabulary
from merge.recipe.adapters import adapters_of
from merge.recipe.model import Recipe, resolve

SHARD_BYTES = 5_000_000_000
RECIPE_FILE = "merge_recipe.yaml"


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
        known: results of a pipeline's earlier stages, by the path of their references; see merge.planners.pipeline.
        vocabulary_of: chooses the output's vocabulary and arranges the inputs' rows by it.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if a model cannot be opened.
    """
    if recipe.mixture is not None:
        from merge.planners.mixture import build_mixture

        return build_mixture(recipe, shard_bytes=shard_bytes)
    method = get_method(recipe.merge_method)
    assert method is not None, recipe.merge_method  # the recipe was checked against the registry
    if adapters_of(recipe.models, recipe.base_model):
        return build_adapter_plan(recipe, method, recipe.name or _default_name(recipe))
    refuse_models(recipe, method)
    inputs = Inputs(recipe, known)
    problems: list[Problem] = []
    recipe = upscaled(recipe, inputs, problems)
    vocabulary = vocabulary_of(recipe, inputs, problems)
    layout = Layout(()) if problems else lay_out_targets(recipe, inputs, problems)
    units: tuple[Units, ...] = ()
    if recipe.align:
        layout, units = align_targets(recipe, inputs, layout, problems)
    builder = _Builder(recipe, inputs, problems)
    steps = [step for target in layout.targets if (step := builder.step(target)) is not None]
    builder.check_whole(steps)
    if recipe.tokenizer_source is None:
        check_tokenizers(inputs)
    copied = copied_files(recipe, inputs, vocabulary, problems)
    if problems:
        raise RecipeError(problems)
    placed, shards = lay_out(steps, shard_bytes)
    name = recipe.name or _default_name(recipe)
    return Plan(
        name=name,
        method=method.name,
        seed=recipe.seed,
        models=tuple(model.source_model() for model in inputs.all),
        base_model=None if recipe.base_model is None else inputs.place(recipe.base_model),
        steps=placed,
        shards=shards,
        side_files=_side_files(
            recipe, name, method, inputs, layout, placed, index_text(placed, shards), vocabulary, copied
        ),  # adds notes
        allow=recipe.allow,
        notes=(*inputs.notes, *builder.notes()),
        recipe_text=recipe.text,
        statistics_files=builder.statistics_files(),
        method_origin=method.origin,
        units=units,
        other_origins=_other_origins(placed, method),
    )


def _other_origins(steps: Sequence[Step], method: Method) -> dict[str, str]:
    """Where the methods of single slices come from, as far as they are not this package's."""
    names = dict.fromkeys(step.method for step in steps if step.method not in ("copy", method.name))
    found = {name: get_method(name) for name in names}
    return {name: other.origin for name, other in found.items() if other is not None and other.origin}


def _default_name(recipe: Recipe) -> str:
    if recipe.file is None:
        return "merge"
    return recipe.file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0].strip(".") or "merge"


class _Builder:
    """Turns targets into steps, and collects what stands in the way."""

    def __init__(self, recipe: Recipe, inputs: Inputs, problems: list[Problem]) -> None:
        self.recipe, self.inputs, self.problems = recipe, inputs, problems
        self.dtype = recipe.out_dtype or recipe.dtype
        self._statistics: dict[StatisticsKind, Statistics] = {}
        self._lenient: Counter[str] = Counter()
        self._unset: dict[tuple[str, str], list[str]] = {}

    def step(self, target: Target) -> Step | None:
        """The step of one target; None if a problem was found, or if nothing is to be written."""
        slots, base = self._ordered(target)
        slots, base, whole = self._present(target, slots, base)
        if not slots and base is None:
            return None
        present = ([base] if base else []) + slots
        refs = [self._ref(slot) for slot in present]
        if any(not DTYPES[ref.dtype].is_float for ref in refs):
            return self._exact(target, present, refs)
        if not whole:
            return self._single(target, present[0])
        if any(ref.shape != refs[0].shape for ref in refs):
            return self._mismatch(target, present, refs)
        return self._merge(target, slots, base)

    def _ref(self, slot: Slot) -> TensorRef:
        ref = self.inputs.all[slot.model].tensors[slot.name]
        return ref if slot.units is None else dataclasses.replace(ref, units=slot.units)

    def _has(self, slot: Slot) -> bool:
        return slot.name in self.inputs.all[slot.model].tensors

    def _model_name(self, slot: Slot) -> str:
        return self.inputs.all[slot.model].ref.text

    def _ordered(self, target: Target) -> tuple[list[Slot], Slot | None]:
        """Inputs and base as the method takes them: the base apart (deltas), first (slerp), or one of the inputs."""
        slots, base = list(target.slots), target.base
        method = _method(target)
        if method.base_apart:
            return [slot for slot in slots if base is None or slot.model != base.model], base
        if method.base == "required" and base is not None:
            slots.sort(key=lambda slot: slot.model != base.model)
        return slots, None

    def _present(self, target: Target, slots: list[Slot], base: Slot | None) -> tuple[list[Slot], Slot | None, bool]:
        """What is really there; False if the method cannot be applied to it and one tensor is copied instead."""
        every = ([base] if base else []) + slots
        missing = [slot for slot in every if not self._has(slot)]
        if not missing:
            return slots, base, True
        if "missing_tensors" not in self.recipe.allow:
            owners = ", ".join(self._model_name(slot) for slot in every if self._has(slot))
            lacking = ", ".join(dict.fromkeys(self._model_name(slot) for slot in missing))
            self.problems.append(
                Problem(
                    f"missing from {lacking}; found in {owners or 'no model'}.",
                    target.name,
                    'Set "allow: [missing_tensors]" to merge it from the models that have it.',
                )
            )
            return [], None, False
        self._lenient["tensor(s) missing from some inputs, merged from those that have them"] += 1
        slots = [slot for slot in slots if self._has(slot)]
        lost_base = base is not None and not self._has(base)
        fewest, _ = _method(target).n_models
        return slots, None if lost_base else base, len(slots) >= fewest and not lost_base

    def _exact(self, target: Target, present: list[Slot], refs: list[TensorRef]) -> Step | None:
        """Integers and masks: one value, on which all inputs must agree."""
        kinds = {(ref.dtype, ref.shape) for ref in refs}
        if len(kinds) > 1 and "integer_mismatch" not in self.recipe.allow:
            found = ", ".join(
                f"{self._model_name(s)} {r.dtype} {list(r.shape)}" for s, r in zip(present, refs, strict=True)
            )
            hint = 'Set "allow: [integer_mismatch]" to copy the first.'
            self.problems.append(Problem(f"an integer tensor that differs in kind: {found}.", target.name, hint))
            return None
        agree = "integer_mismatch" not in self.recipe.allow
        kept = present if agree else present[:1]
        return self._make(target, "copy", kept, None, {}, refs[0].dtype)

    def _mismatch(self, target: Target, present: list[Slot], refs: list[TensorRef]) -> Step | None:
        if "shape_mismatch" not in self.recipe.allow:
            found = ", ".join(f"{self._model_name(s)} {list(r.shape)}" for s, r in zip(present, refs, strict=True))
            hint = 'Set "allow: [shape_mismatch]" to copy it from the base (else the first model).'
            if len({ref.shape[1:] for ref in refs}) == 1 and (is_embedding(target.name) or is_head(target.name)):
                arrange = 'Set "tokenizer_source: union" (or base, or a model) to arrange the rows by token. '
                hint = "The vocabularies differ in size. " + arrange + hint
            self.problems.append(Problem(f"shapes differ: {found}.", target.name, hint))
            return None
        self._lenient["tensor(s) of different shapes, copied from the first"] += 1
        return self._single(target, present[0])

    def _single(self, target: Target, slot: Slot) -> Step:
        """One input's tensor as it is, in the output's dtype."""
        ref = self._ref(slot)
        dtype = self._out_dtype(ref)
        plain = ref.dtype == dtype and ref.strides is None and ref.is_exact
        return self._make(target, "copy" if plain else "passthrough", [slot], None, {}, dtype)

    def _merge(self, target: Target, slots: list[Slot], base: Slot | None) -> Step | None:
        method = _method(target)
        parameters = self._parameters(method, target, slots)
        if parameters is None:
            return None
        if method.copies(parameters):
            return self._single(target, slots[0])
        if (message := method.check(parameters) if method.check else None) is not None:
            self.problems.append(Problem(message, target.name))
            return None
        owners = [(slot.statistics, self._model_name(slot), self._ref(slot)) for slot in slots]
        statistics = self._statistics_of(method, target.name, owners)
        donor = self._ref(base or self._donor_slot(slots))
        step = self._make(target, method.name, slots, base, parameters, self._out_dtype(donor))
        return dataclasses.replace(step, statistics=statistics)

    def _statistics_of(self, method: Method, name: str, owners: list[Any]) -> tuple[TensorRef, ...]:
        kind = method.statistics
        if kind is None:
            return ()
        if kind not in self._statistics:
            self._statistics[kind] = Statistics(self.recipe, kind, self.problems)
        return self._statistics[kind].of(name, owners)

    def statistics_files(self) -> tuple[SourceFile, ...]:
        return tuple(dict.fromkeys(file for each in self._statistics.values() for file in each.files))

    def _donor_slot(self, slots: list[Slot]) -> Slot:
        return min(slots, key=lambda slot: slot.model)

    def _out_dtype(self, ref: TensorRef) -> str:
        if self.dtype is not None:
            return self.dtype
        return "BF16" if ref.scale is not None else ref.dtype  # FP8 with scales is not FP8 any more

    def _make(
        self, target: Target, method: str, slots: list[Slot], base: Slot | None, parameters: dict[str, Any], dtype: str
    ) -> Step:
        refs = [self._ref(slot) for slot in slots]
        return Step(
            name=target.name,
            shape=refs[0].shape,
            dtype=dtype,
            file="",
            offset=0,
            method=method,
            inputs=tuple(refs),
            models=tuple(slot.model for slot in slots),
            base=None if base is None else self._ref(base),
            base_model=None if base is None else base.model,
            parameters=parameters,
        )

    def _parameters(self, method: Method, target: Target, slots: list[Slot]) -> dict[str, Any] | None:
        """Every parameter of the method as a number (a tuple of one for each input, if it is per model)."""
        values: dict[str, Any] = {}
        complete = True
        for parameter in method.parameters:
            if parameter.per_model:
                found = tuple(
                    self._value(parameter, slot.settings, self._ref(slot).name, target.t, self._model_name(slot))
                    for slot in slots
                )
                complete = complete and not (parameter.required and None in found)
                if any(value is not None for value in found):
                    values[parameter.name] = found
            else:
                value = self._value(parameter, target.settings, target.name, target.t, "the recipe")
                complete = complete and not (parameter.required and value is None)
                if value is not None:
                    values[parameter.name] = value
        return values if complete else None

    def _value(self, parameter: Parameter, levels: Sequence[Any], tensor_name: str, t: float, owner: str) -> Any:
        value = resolve(levels, parameter.name, tensor_name, t)
        if value is None:
            if parameter.required:
                self._unset.setdefault((parameter.name, owner), []).append(tensor_name)
            return parameter.default
        if parameter.kind is bool:
            return bool(value)
        return float(value) if parameter.kind is float else value

    def check_whole(self, steps: list[Step]) -> None:
        """Problems that only show over all tensors."""
        for (key, owner), names in self._unset.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            hint = "Add a value without a filter."
            self.problems.append(
                Problem(f'"{key}" of {owner} has no value for {some}.', self.recipe.where("parameters"), hint)
            )
        if not steps and not self.problems:
            self.problems.append(Problem("the recipe leads to no tensor at all", self.recipe.file))
        self._check_model_trim(steps)

    def _check_model_trim(self, steps: list[Step]) -> None:
        densities: dict[int, dict[float, None]] = {}
        for step in steps:
            if step.parameters.get("trim") == "model":
                for model, density in zip(step.models, step.parameters["density"], strict=True):
                    densities.setdefault(model, {})[density] = None
        for model, found in densities.items():
            if len(found) > 1:
                name = self.inputs.all[model].ref.text
                self.problems.append(
                    Problem(
                        f'"trim: model" needs one density for a model; {name} has {sorted(found)}.', self.recipe.file
                    )
                )

    def notes(self) -> list[str]:
        return [f"{count} {what}" for what, count in self._lenient.items()]


def _method(target: Target) -> Method:
    method = get_method(target.method)
    assert method is not None, target.method  # the recipe was checked against the registry
    return method


def _side_files(
    recipe: Recipe,
    name: str,
    method: Method,
    inputs: Inputs,
    layout: Layout,
    steps: Sequence[Step],
    index: str | None,
    vocabulary: Vocabulary | None,
    copied: Sequence[SideFile],
) -> tuple[SideFile, ...]:
    donor = inputs.donor
    bytes_of: Counter[str] = Counter()
    for step in steps:
        if DTYPES[step.dtype].is_float:
            bytes_of[step.dtype] += step.nbytes
    dtype = max(bytes_of, key=lambda key: bytes_of[key], default="F32")
    config = output_config(
        donor.config if vocabulary is None else vocabulary.adapted(donor.config, inputs.notes),
        dtype=torch_name(dtype),
        tied=inputs.tied,
        vocabulary=next((step.shape[0] for step in steps if is_embedding(step.name) and step.shape), None),
        stacks=layout.stacks,
        notes=inputs.notes,
    )
    models = [model.source_model() for model in inputs.all]
    base = None if recipe.base_model is None else inputs.place(recipe.base_model)
    made = {
        "README.md": model_card(recipe, name, method, models, base, (step.method for step in steps)),
        "config.json": config,
        RECIPE_FILE: recipe.text,
    }
    if index is not None:
        made[INDEX] = index
    return (
        *(file for file in copied if file.name not in made),
        *(SideFile(file, text=text) for file, text in made.items()),
    )
