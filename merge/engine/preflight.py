"""Checks on a few tensor bytes before the work starts: whether the models are fine-tunes of the base."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from merge.engine.context import Context
from merge.engine.tensor import StepTensor
from merge.errors import NumbersError
from merge.kernels.elementwise import difference_sums
from merge.plan import Derived, Step, TensorRef
from merge.sources import rounding
from merge.sources.stage import looks_at_all

_UNRELATED = 0.9  # median of ‖d‖/‖b‖ above which the base is not the models' base; fine-tunes are below 0.2
_MOST, _MOST_DEAR = 1_000, 9
_MIN_ELEMENTS = 1024  # biases and layer norms tell little


def check_models(context: Context) -> list[dict[str, Any]]:
    """Looks at one chunk of every matrix: a task vector as long as its base, or one that is zero, is an error.

    Returns:
        For each model that is quantised, or whose base is: `task_vector`, its length over that of the base (median over
        tensors), and `rounding`, about what the rounding of their formats alone makes of that.

    Raises:
        NumbersError: unless the recipe allows it (unrelated_base, zero_task_vector).
    """
    plan = context.plan
    steps = [step for step in plan.steps if step.base is not None and step.kind != "copy"]
    if not steps:
        return []
    ratios: dict[int, list[float]] = {}
    for step in _worth_a_look(steps):
        for model, base, delta in _sample(context, step):
            if step.size >= _MIN_ELEMENTS and base > 0:
                ratios.setdefault(model, []).append(math.sqrt(delta / base))
            elif delta > 0:
                ratios.setdefault(model, [])
    for model in sorted({model for step in steps for model in step.models}):
        _check_ratios(context, steps, model, ratios.get(model, []))
    context.buffers.give_back()  # this thread carries out no steps; with 200 models it would hold 50 MB to the end
    return _quantised(context, steps, ratios)


def _quantised(context: Context, steps: list[Step], ratios: dict[int, list[float]]) -> list[dict[str, Any]]:
    """See check_models; what an adapter changes of a quantised base is exact."""
    shares: dict[int, list[float]] = {}
    for step in steps:
        of_base = 0.0 if step.base is None else rounding(step.base)
        for model, ref in zip(step.models, step.inputs, strict=True):
            share = math.hypot(of_base, rounding(ref))
            if share and not (of_base and _rests_on(ref, step.base)):
                shares.setdefault(model, []).append(share)
    return [
        {
            "model": context.plan.models[model].ref,
            "task_vector": statistics.median(ratios[model]),
            "rounding": statistics.median(found),
        }
        for model, found in sorted(shares.items())
        if ratios.get(model)
    ]


def _rests_on(ref: TensorRef, base: TensorRef | None) -> bool:
    """Whether it is the base's own tensor, changed: the rounding of the two is then the same."""
    return ref == base or (isinstance(ref, Derived) and any(_rests_on(each, base) for each in ref.inputs))


def _worth_a_look(steps: list[Step]) -> list[Step]:
    """A sample of tensors from the whole model; where a chunk costs as much as the tensor, only a few small ones."""
    dear = [step for step in steps if any(looks_at_all(ref) for ref in step.sources)]
    seen = {id(step) for step in dear}
    large = [step for step in dear if step.size >= _MIN_ELEMENTS]
    few = sorted(large, key=lambda step: step.size)[:_MOST_DEAR]
    cheap = [step for step in steps if id(step) not in seen]
    return cheap[:: -(-len(cheap) // _MOST) or 1] + few


def _check_ratios(context: Context, steps: list[Step], model: int, ratios: list[float]) -> None:
    plan = context.plan
    base = plan.models[steps[0].base_model or 0].ref
    name = plan.models[model].ref
    if ratios and statistics.median(ratios) > _UNRELATED and "unrelated_base" not in plan.allow:
        raise NumbersError(
            f"{name} is not a fine-tune of {base}: its task vector is {statistics.median(ratios):.2f} times as long as "
            'the base (median over tensors). Name the right base_model, or set "allow: [unrelated_base]".'
        )
    if not any(ratios) and "zero_task_vector" not in plan.allow and _is_equal(context, steps, model):
        raise NumbersError(
            f"{name} equals the base {base} in every tensor: its task vector is zero. Take it out of the recipe, "
            'or set "allow: [zero_task_vector]".'
        )


def _sample(context: Context, step: Step) -> list[tuple[int, float, float]]:
    """(model, ‖b‖², ‖d‖²) of a tensor's middle chunk."""
    tensor = context.tensor(step)
    if not tensor.n_chunks:
        return []
    sums = _sums(tensor, step, tensor.n_chunks // 2)
    context.reader.release(step.sources)
    return sums


def _sums(tensor: StepTensor, step: Step, chunk: int) -> list[tuple[int, float, float]]:
    raw = tensor.load(chunk).raw
    if raw.dtype == np.float64:
        with np.errstate(over="ignore"):
            raw = raw.astype(np.float32)
    return [(model, *difference_sums(raw, row + 1)) for row, model in enumerate(step.models)]


def _is_equal(context: Context, steps: list[Step], model: int) -> bool:
    """Whether a model equals the base everywhere; stops reading at the first difference."""
    for step in steps:
        if model in step.models:
            tensor = context.tensor(step)
            row = step.models.index(model) + 1
            for chunk in range(tensor.n_chunks):
                raw = tensor.load(chunk).raw
                if not np.array_equal(raw[0], raw[row]):
                    return False
    return True
