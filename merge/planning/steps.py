"""Targets -> steps: resolves which tensors exist, the parameters that combine them, and the output dtype."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from merge.architecture import is_embedding, is_head
from merge.dtypes import DTYPES
from merge.errors import Problem
from merge.methods import Method, get_method, known_method
from merge.methods.registry import ModelPass, StatisticsKind
from merge.plan import COPY, SourceFile, Step, TensorRef
from merge.planned import Planned
from merge.planning.inputs import Inputs
from merge.planning.statistics import Statistics
from merge.planning.targets import Slot, Target
from merge.recipe.model import Conditional, Recipe, Settings
from merge.recipe.settings import Levels, ParameterValues


@dataclasses.dataclass(frozen=True)
class Steps:
    """All steps; `leniencies`: how often each was used; the statistics files that the steps read."""

    steps: list[Step]
    leniencies: tuple[str, ...]
    statistics_files: tuple[SourceFile, ...]


def build_steps(recipe: Recipe, inputs: Inputs, targets: Sequence[Target]) -> Planned[Steps]:
    builder = _StepBuilder(recipe, inputs)
    steps = [step for target in targets if (step := builder.step(target)) is not None]
    builder.check_whole(steps)
    made = Steps(steps, builder.leniencies(), builder.statistics_files())
    return Planned(made, tuple(builder.problems))


class _StepBuilder:
    """Turns targets into steps, and collects the problems."""

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.recipe, self.inputs = recipe, inputs
        self.problems: list[Problem] = []
        self.dtype = recipe.out_dtype or recipe.dtype
        self._keeps_float32 = inputs.donor.architecture.keeps_float32(self.dtype or "")
        self._tensors = [model.tensors for model in inputs.all]
        self._statistics: dict[StatisticsKind, Statistics] = {}
        self._lenient: Counter[str] = Counter()
        self._values = ParameterValues()
        self._known: dict[object, dict[str, Any]] = {}  # parameters
        self._has_filters: dict[int, bool] = {}

    def step(self, target: Target) -> Step | None:
        """The step of one target; None if a problem was found, or if there is nothing to write."""
        slots, base = self._ordered(target)
        slots, base, whole = self._present(target, slots, base)
        if not slots and base is None:
            return None
        present = ([base] if base else []) + slots
        refs = [self._ref(slot) for slot in present]
        for dtype in {ref.dtype for ref in refs}:
            if not DTYPES[dtype].is_float:
                return self._exact(target, present, refs)
        if not whole:
            return self._single(target, present[0])
        if len({ref.shape for ref in refs}) > 1:
            return self._mismatch(target, present, refs)
        return self._merge(target, slots, base)

    def _ref(self, slot: Slot) -> TensorRef:
        return slot.made or self._tensors[slot.model][slot.name]

    def _has(self, slot: Slot) -> bool:
        return slot.made is not None or slot.name in self._tensors[slot.model]

    def _model_name(self, slot: Slot) -> str:
        return self.inputs.all[slot.model].ref.text

    def _ordered(self, target: Target) -> tuple[list[Slot], Slot | None]:
        """Inputs and base as the method takes them: the base separate (deltas), first (slerp), or among the inputs."""
        slots, base = list(target.slots), target.base
        method = known_method(target.method)
        if method.base_apart:
            return [slot for slot in slots if base is None or slot.model != base.model], base
        if method.base == "required" and base is not None:
            slots.sort(key=lambda slot: slot.model != base.model)
        return slots, None

    def _present(self, target: Target, slots: list[Slot], base: Slot | None) -> tuple[list[Slot], Slot | None, bool]:
        """The tensors that exist; False if the method cannot be applied to them and one is copied instead."""
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
        fewest, _ = known_method(target.method).n_models
        return slots, None if lost_base else base, len(slots) >= fewest and not lost_base

    def _exact(self, target: Target, present: list[Slot], refs: list[TensorRef]) -> Step | None:
        """Copies an integer tensor or mask, which must be equal in all inputs."""
        kinds = {(ref.dtype, ref.shape) for ref in refs}
        if len(kinds) > 1 and "integer_mismatch" not in self.recipe.allow:
            found = ", ".join(
                f"{self._model_name(s)} {r.dtype} {list(r.shape)}" for s, r in zip(present, refs, strict=True)
            )
            hint = 'Set "allow: [integer_mismatch]" to copy the first.'
            self.problems.append(Problem(f"integer tensors differ in dtype or shape: {found}.", target.name, hint))
            return None
        agree = "integer_mismatch" not in self.recipe.allow
        kept = present if agree else present[:1]
        return self._make(target, COPY, kept, None, {}, refs[0].dtype)

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
        """Copies one input's tensor in the output's dtype."""
        ref = self._ref(slot)
        dtype = self._out_dtype(target, ref)
        if self.dtype in ("BF16", "F16") and dtype == "F32" and ref.dtype in ("BF16", "F16"):
            dtype = ref.dtype  # a copy keeps its full precision
        return self._make(target, COPY if ref.copies_to(dtype) else "passthrough", [slot], None, {}, dtype)

    def _merge(self, target: Target, slots: list[Slot], base: Slot | None) -> Step | None:
        method = known_method(target.method)
        parameters = self._parameters(method, target, slots)
        if parameters is None:
            return None
        if method.copies(parameters):
            return self._single(target, slots[0])
        if (message := method.check(parameters) if method.check else None) is not None:
            self.problems.append(Problem(message, target.name))
            return None
        statistics = self._statistics_of(method, target.name, slots)
        donor = self._ref(base or self._donor_slot(slots))
        return self._make(target, method.name, slots, base, parameters, self._out_dtype(target, donor), statistics)

    def _statistics_of(self, method: Method, name: str, slots: list[Slot]) -> tuple[TensorRef, ...]:
        kind = method.statistics
        if kind is None:
            return ()
        if kind not in self._statistics:
            self._statistics[kind] = Statistics(self.recipe, kind)
            self.problems += self._statistics[kind].problems
        owners = [(slot.statistics, self._model_name(slot), self._ref(slot)) for slot in slots]
        found = self._statistics[kind].of(name, owners)
        self.problems += found.problems
        return found.value

    def statistics_files(self) -> tuple[SourceFile, ...]:
        return tuple(dict.fromkeys(file for each in self._statistics.values() for file in each.files))

    def _donor_slot(self, slots: list[Slot]) -> Slot:
        return min(slots, key=lambda slot: slot.model)

    def _out_dtype(self, target: Target, ref: TensorRef) -> str:
        if self.dtype is not None:
            return "F32" if self._keeps_float32(target.name) else self.dtype
        return ref.dtype

    def _make(
        self,
        target: Target,
        method: str,
        slots: list[Slot],
        base: Slot | None,
        parameters: dict[str, Any],
        dtype: str,
        statistics: tuple[TensorRef, ...] = (),
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
            statistics=statistics,
        )

    def _parameters(self, method: Method, target: Target, slots: list[Slot]) -> dict[str, Any] | None:
        """Every parameter of the method as a number, or a tuple with one for each input if it is per model.

        Resolved once for all tensors of a layer where no setting has a filter: there may be 100,000 tensors.
        """
        levels = (target.settings, *(slot.settings for slot in slots))
        if any(map(self._filters, levels)):
            return self._resolved(method, target, slots)
        key = (method.name, target.t, *map(id, levels))  # targets hold the settings, so no other gets the same id
        if key not in self._known:
            found = self._resolved(method, target, slots)
            if found is None:  # a problem, which names its tensor
                return None
            self._known[key] = found
        return self._known[key]

    def _filters(self, levels: tuple[Settings, ...]) -> bool:
        """Whether any setting depends on a tensor's name."""
        found = self._has_filters.get(id(levels))
        if found is None:
            values = (value for level in levels for value in level.values())
            found = any(isinstance(each, tuple) and each and isinstance(each[0], Conditional) for each in values)
            self._has_filters[id(levels)] = found
        return found

    def _resolved(self, method: Method, target: Target, slots: list[Slot]) -> dict[str, Any] | None:
        shared = Levels(target.settings, "the recipe", target.name)
        inputs = [Levels(slot.settings, self._model_name(slot), self._ref(slot).name) for slot in slots]
        return self._values.of(method.parameters, shared, inputs, target.t)

    def check_whole(self, steps: list[Step]) -> None:
        """Problems that appear only over all tensors."""
        self.problems += self._values.problems(self.recipe.where("parameters"))
        self._check_model_pass(steps)

    def _check_model_pass(self, steps: list[Step]) -> None:
        """A number that is computed over a whole model needs the same parameter for all its tensors."""
        found: dict[tuple[ModelPass, int], dict[float, None]] = {}
        for step in steps:
            method = get_method(step.method)
            if method is not None and method.model_pass is not None and method.looks_at_model(step.parameters):
                for model, value in zip(step.models, step.parameters[method.model_pass.uniform], strict=True):
                    found.setdefault((method.model_pass, model), {})[value] = None
        for (look, model), values in found.items():
            if len(values) > 1:
                said = f'"{look.key}: {look.value}" needs one {look.uniform} for a model; '
                said += f"{self.inputs.all[model].ref.text} has {sorted(values)}."
                self.problems.append(Problem(said, self.recipe.file))

    def leniencies(self) -> tuple[str, ...]:
        return tuple(f"{count} {what}" for what, count in self._lenient.items())
