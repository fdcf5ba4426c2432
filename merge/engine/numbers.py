"""Refuses NaN, infinity and overflow that the recipe does not allow; they are counted during reading and rounding."""

from __future__ import annotations

from typing import Any

from merge.errors import NumbersError
from merge.plan import Plan, Step


def check_numbers(plan: Plan, step: Step, record: dict[str, Any]) -> None:
    """Ends the run at the first tensor with such numbers, unless the recipe allows them.

    Raises:
        NumbersError: naming the tensor, the models and the counts.
    """
    if "nonfinite_in" in record and "nonfinite" not in plan.allow:
        models = [plan.models[i].ref for i in _source_models(step)]
        found = ", ".join(f"{n:,} in {model}" for model, n in zip(models, record["nonfinite_in"], strict=True) if n)
        raise NumbersError(
            f'{step.name}: NaN or infinite values in the input: {found}. Set "allow: [nonfinite]" to merge them.'
        )
    if "overflow" in record and "overflow" not in plan.allow:
        raise NumbersError(
            f"{step.name}: {record['overflow']:,} values (largest {record['absmax']:.6g}) do not fit {step.dtype}. "
            'Choose another dtype, or set "allow: [overflow]" to let them become infinite.'
        )
    if "nonfinite" in record and "nonfinite" not in plan.allow:
        raise NumbersError(
            f"{step.name}: the merge gives {record['nonfinite']:,} NaN or infinite values from finite inputs. "
            'Look at its weights, or set "allow: [nonfinite]".'
        )


def _source_models(step: Step) -> tuple[int, ...]:
    return step.models if step.base_model is None or step.base is None else (step.base_model, *step.models)
