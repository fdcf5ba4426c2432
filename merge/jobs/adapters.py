"""Recipes whose inputs are LoRA adapters: recipe + headers -> the Plan of an adapter that PEFT loads.

The changes that the adapters make to each matrix are merged, d_i = s_i B_i A_i, never the A_i and B_i by
themselves: (sum w_i B_i)(sum w_i A_i) has terms that no adapter had. A module that an adapter does not have is a change
of zero. Each module becomes two steps, its factors A and B (merge/engine/factors.py computes them).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from merge.adapters.inputs import FOLD, AdapterInputs, open_inputs, unfit, unlike
from merge.adapters.parts import LoraModule
from merge.architecture import Stack, find_stacks
from merge.checkpoint.side_files import list_side_files
from merge.dtypes import DTYPES
from merge.errors import Problem, RecipeError
from merge.methods import Method
from merge.methods.registry import OUTPUT_RANK
from merge.output.adapter_config import adapter_config, ranks_said
from merge.output.card import model_card
from merge.output.shards import lay_out
from merge.output.task import ADAPTER_TASKS
from merge.plan import COPY, Derived, Plan, SideFile, Step, TensorRef
from merge.planning.factors import GROUP, is_exact
from merge.planning.targets import gradient_place
from merge.recipe.model import Recipe
from merge.recipe.settings import Levels, ParameterValues, resolve

RECIPE_FILE = "merge_recipe.yaml"
PREFIX = "base_model.model."


def build_adapter_plan(recipe: Recipe, method: Method, name: str) -> Plan:
    """The plan of a recipe whose models are all adapters.

    Raises:
        RecipeError: with every problem there is.
        CheckpointError: if an adapter, or the base that the recipe names, cannot be opened.
    """
    inputs = open_inputs(recipe)
    builder = _Builder(recipe, method, inputs)
    steps = builder.steps()
    problems = [*unfit(recipe, method), *unlike(recipe, inputs), *builder.all_problems()]
    if problems:
        raise RecipeError(problems)
    placed, shards = lay_out(steps, sys.maxsize, "adapter_model")  # one file: PEFT reads no shards of an adapter
    ranks = {step.inputs[0].name: step.shape[0] for step in steps if step.factor == "A"}
    models = inputs.models()
    base = None if inputs.base is None else 0
    made = {
        "README.md": model_card(recipe, name, method, list(models), base, adapter=True, task=_task(inputs)),
        "adapter_config.json": adapter_config(inputs.adapters, ranks, inputs.base_name()),
        RECIPE_FILE: recipe.text,
    }
    donor = inputs.adapters[0].path
    copied = [SideFile.copy(file, f"{donor}/{file}") for file in list_side_files(donor) if file not in made]
    return Plan(
        name=name,
        method=method.name,
        seed=recipe.seed,
        models=models,
        base_model=base,
        steps=placed,
        shards=shards,
        side_files=(*copied, *(SideFile(file, text=text) for file, text in made.items())),
        allow=recipe.allow,
        compat=recipe.compat,
        notes=(*recipe.notes, *inputs.notes(), *builder.notes(), *_said(steps, ranks)),
        recipe_text=recipe.text,
        method_origin=method.origin,
    )


def _task(inputs: AdapterInputs) -> str | None:
    kind = inputs.adapters[0].config.get("task_type")
    return ADAPTER_TASKS.get(kind) if isinstance(kind, str) else None


class _Builder:
    """Turns modules into pairs of steps and saved tensors into averages, and collects the problems."""

    def __init__(self, recipe: Recipe, method: Method, inputs: AdapterInputs) -> None:
        self.recipe, self.method, self.inputs = recipe, method, inputs
        self.problems: list[Problem] = []
        self.stacks = find_stacks((f"{n}.weight" for adapter in inputs.adapters for n in adapter.modules), {})
        self.missing = 0
        self.values = ParameterValues()

    def steps(self) -> list[Step]:
        adapters = self.inputs.adapters
        saved = dict.fromkeys(name for adapter in adapters for name in adapter.saved)
        steps = [step for name in saved if (step := self._saved(name)) is not None]
        names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
        pairs = [pair for name in sorted(names, key=self._order) if (pair := self._module(name)) is not None]
        for first in range(0, len(pairs), GROUP):
            steps += [step for half in zip(*pairs[first : first + GROUP], strict=True) for step in half]
        return steps

    def _order(self, module: str) -> int:
        """Modules outside the layers first, then layer by layer."""
        found = self._layer(f"{module}.weight")
        return -1 if found is None else found[0]

    def _layer(self, tensor: str) -> tuple[int, Stack] | None:
        for stack in self.stacks:
            if (found := stack.layer(tensor)) is not None:
                return found[0], stack
        return None

    def _module(self, name: str) -> tuple[Step, Step] | None:
        """Steps of A and B; None if a problem was found."""
        listed = [adapter.modules.get(name) for _, adapter in self.inputs.listed()]
        present = [module for module in listed if module is not None]
        shapes = [(module.b.shape[0], module.a.shape[1]) for module in present]
        kinds = [(*shape, m.embedding, m.fan_in_fan_out) for shape, m in zip(shapes, present, strict=True)]
        if len(set(kinds)) > 1:
            self._differ(name, listed)
            return None
        if not self._fits_base(present[0], shapes[0]):
            return None
        parameters = self._parameters(f"{name}.weight", range(len(listed)))
        if parameters is None:
            return None
        if (message := self.method.check(parameters) if self.method.check else None) is not None:
            self.problems.append(Problem(message, name))
            return None
        changes = tuple(_change(name, module, shapes[0]) for module in listed)
        rank = self._rank(name, [0 if module is None else module.rank for module in listed], min(shapes[0]))
        suffix, leaf = ("lora_embedding_", "") if present[0].embedding else ("lora_", ".weight")
        step = Step(
            name=f"{PREFIX}{name}.{suffix}A{leaf}",
            shape=(rank, shapes[0][1]),
            dtype=self._dtype([ref for module in present for ref in (module.a, module.b)]),
            file="",
            offset=0,
            method=self.method.name,
            inputs=changes,
            models=tuple(self.inputs.model(place) for place in range(len(listed))),
            parameters=parameters,
            factor="A",
        )
        b_name = f"{PREFIX}{name}.{suffix}B{leaf}"
        return step, replace(step, name=b_name, shape=(shapes[0][0], rank), factor="B")

    def _differ(self, name: str, listed: Sequence[LoraModule | None]) -> None:
        found = dict.fromkeys(
            f"{source.model.text} {module.b.shape[0]}x{module.a.shape[1]}"
            + (" (an embedding)" if module.embedding else " (fan_in_fan_out)" if module.fan_in_fan_out else "")
            for (source, _), module in zip(self.inputs.listed(), listed, strict=True)
            if module is not None
        )
        hint = "They were not trained on one base; remove those that do not belong."
        self.problems.append(Problem(f"adapters change matrices of different kinds: {', '.join(found)}.", name, hint))

    def _fits_base(self, module: LoraModule, shape: tuple[int, int]) -> bool:
        """Checks that the recipe's base has this matrix in this shape, if it can be found by name."""
        base = self.inputs.base
        stored = None if base is None else base.tensors.get(f"{module.name}.weight")
        wanted = shape[::-1] if module.embedding or module.fan_in_fan_out else shape
        if base is None or stored is None or stored.shape == wanted:
            return True
        said = f"the adapters change a matrix of {list(wanted)}, and {base.ref.text} has {list(stored.shape)}."
        self.problems.append(Problem(said, module.name, "Name the base that they were trained on, or leave it out."))
        return False

    def _rank(self, name: str, ranks: Sequence[int], most: int) -> int:
        """The rank of the result; see docs/adapters.md."""
        total, how = sum(ranks), self.method.on_factors
        if how is not None and how.rank == "all":
            return total
        wanted = resolve((self.recipe.parameters,), OUTPUT_RANK.name, f"{name}.weight", self._t(f"{name}.weight"))
        default = max(ranks) if how is not None and how.rank == "largest" else total
        rank = min(int(wanted or default), most)
        return rank if how is None else min(rank, total)

    def _saved(self, name: str) -> Step | None:
        """Averages a tensor that adapters save whole; it is not a change that could be added."""
        has = [(place, adapter) for place, (_, adapter) in enumerate(self.inputs.listed()) if name in adapter.saved]
        if len(has) < len(self.inputs.places):
            if "missing_tensors" not in self.recipe.allow:
                lacking = dict.fromkeys(s.model.text for s, a in self.inputs.listed() if name not in a.saved)
                owners = dict.fromkeys(adapter.ref.text for _, adapter in has)
                said = f"saved whole in {', '.join(owners)} (modules_to_save) and not in {', '.join(lacking)}."
                hint = 'Set "allow: [missing_tensors]" to average it over the adapters that have it.'
                self.problems.append(Problem(said, name, hint))
                return None
            self.missing += 1
        refs = [adapter.saved[name] for _, adapter in has]
        weight = self._whole_weights(name, [place for place, _ in has])
        if any(ref.shape != refs[0].shape for ref in refs) or not all(DTYPES[ref.dtype].is_float for ref in refs):
            found = ", ".join(f"{a.ref.text} {r.dtype} {list(r.shape)}" for (_, a), r in zip(has, refs, strict=True))
            self.problems.append(Problem(f"saved whole in different shapes or no floats: {found}.", name))
            return None
        if weight is None:
            return None
        dtype = self._dtype(refs)
        alone = len(refs) == 1 and refs[0].copies_to(dtype)
        return Step(
            name=refs[0].name,
            shape=refs[0].shape,
            dtype=dtype,
            file="",
            offset=0,
            method=COPY if alone else "linear",
            inputs=tuple(refs),
            models=tuple(self.inputs.model(place) for place, _ in has),
            parameters={} if alone else {"weight": weight, "normalize": True},
        )

    def _whole_weights(self, name: str, places: Sequence[int]) -> tuple[float, ...] | None:
        values = (self._parameters(name, places) or {}).get("weight")  # without them a problem is noted already
        weight = tuple(values or (1.0,) * len(places))
        if min(weight) < 0 or sum(weight) < 1e-8:
            said = f"a whole tensor (modules_to_save) is averaged, which weights of {list(weight)} do not allow."
            self.problems.append(Problem(said, name, FOLD))
            return None
        return weight

    def _dtype(self, refs: Sequence[TensorRef]) -> str:
        """The recipe's dtype, else the widest of the inputs'; for float16 with bfloat16, float32."""
        said = self.recipe.out_dtype or self.recipe.dtype
        found = {ref.dtype: DTYPES[ref.dtype].itemsize for ref in refs}
        widest = [dtype for dtype, width in found.items() if width == max(found.values())]
        return said or (widest[0] if len(widest) == 1 and DTYPES[widest[0]].itemsize > 1 else "F32")

    def _parameters(self, tensor: str, places: Sequence[int]) -> dict[str, Any] | None:
        """Every parameter of the method as a number; a tuple of one for each source of `places`, if it is per model."""
        parameters = [parameter for parameter in self.method.parameters if parameter.name != OUTPUT_RANK.name]
        shared = (self.recipe.parameters,)
        sources = [self.inputs.sources[place] for place in places]
        inputs = [Levels((source.parameters, *shared), source.model.text, tensor) for source in sources]
        return self.values.of(parameters, Levels(shared, "the recipe", tensor), inputs, self._t(tensor))

    def _t(self, tensor: str) -> float:
        layer = self._layer(tensor)
        return 0.0 if layer is None else gradient_place(layer[0], layer[1].n_layers)

    def all_problems(self) -> list[Problem]:
        self.problems += self.values.problems(self.recipe.where("parameters"))
        return self.problems

    def notes(self) -> list[str]:
        said = "whole tensor(s) that some adapters lack, averaged over those that have them"
        return [f"{self.missing} {said}"] if self.missing else []


def _change(name: str, module: LoraModule | None, shape: tuple[int, int]) -> TensorRef:
    """The change that one adapter makes to a module, (out, in); zero if it lacks the module"""
    factors = () if module is None else (module.a, module.b)
    return Derived(name, "F32", shape, "low_rank", factors, {"scaling": 1.0 if module is None else module.scaling})


def _said(steps: Sequence[Step], ranks: dict[str, int]) -> list[str]:
    notes = [f"the result is a LoRA adapter: {len(ranks)} modules, {ranks_said(ranks)}"]
    if any(step.factor and not is_exact(step) for step in steps):
        notes.append(
            "the share of the sum's squared length that the ranks keep is reported at the end of the run, "
            "and for each module in merge_manifest.json (kept_energy)"
        )
    return notes
