"""The Open LLM Leaderboard's tasks, versions 1 and 2: exact tasks, shots and metrics, and the scores it shows.

Version 1 shows raw scores; MMLU is the mean over its 57 subjects. Version 2 takes chance away from each subtask,
max(0, (v - b) / (1 - b)) with b = 1 / choices, and shows the mean over subtasks; GPQA and MATH count as one task each,
IFEval is the mean of strict accuracy by prompt and by instruction.

Source: huggingface.co/docs/leaderboards/open_llm_leaderboard (about, normalization).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from eval.results import ScorePart, TaskResult
from eval.tasks.task import Suite, Task

METRIC = "score"

# Choices of each subtask of BBH.
BBH = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
MUSR = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}


def suite_v1() -> Suite:
    tasks = (
        _task("arc_challenge", "ARC", 25, "acc_norm", "allenai/ai2_arc, ARC-Challenge"),
        _task("hellaswag", "HellaSwag", 10, "acc_norm", "Rowan/hellaswag"),
        _task("mmlu", "MMLU", 5, "acc", "cais/mmlu, all 57 subjects", parts=_mmlu),
        _task("truthfulqa_mc2", "TruthfulQA", 0, "acc", "truthfulqa/truthful_qa, multiple_choice"),
        _task("winogrande", "Winogrande", 5, "acc", "allenai/winogrande, winogrande_xl"),
        _task("gsm8k", "GSM8K", 5, "exact_match", "openai/gsm8k, main", key="exact_match,strict-match"),
    )
    return Suite("openllm-v1", "ARC, HellaSwag, MMLU, TruthfulQA, Winogrande, GSM8K as the first leaderboard", tasks)


def suite_v2() -> Suite:
    ifeval = [ScorePart("leaderboard_ifeval", f"{level}_level_strict_acc,none") for level in ("prompt", "inst")]
    bbh = [ScorePart(f"leaderboard_bbh_{name}", "acc_norm,none", 1 / n) for name, n in BBH.items()]
    musr = [ScorePart(f"leaderboard_musr_{name}", "acc_norm,none", 1 / n) for name, n in MUSR.items()]
    gpqa = [ScorePart("leaderboard_gpqa", "acc_norm,none", 1 / 4)]
    mmlu_pro = [ScorePart("leaderboard_mmlu_pro", "acc,none", 1 / 10)]
    tasks = (
        _task(
            *("leaderboard_ifeval", "IFEval", 0, "prompt_level_strict_acc", "wis-k/instruction-following-eval"),
            parts=lambda tasks: ifeval,
            extra='"lm-eval[ifeval]" "setuptools<81"',  # for pkg_resources, which the task imports
            nltk="tokenizers/punkt_tab",
            also=("inst_level_strict_acc,none",),
        ),
        _task("leaderboard_bbh", "BBH", 3, "acc_norm", "SaylorTwift/bbh, 24 subtasks", parts=lambda tasks: bbh),
        _task(
            *("leaderboard_math_hard", "MATH Lvl 5", 4, "exact_match", "DigitalLearningGmbH/MATH-lighteval"),
            extra='"lm-eval[math]"',
        ),
        _task(
            *("leaderboard_gpqa", "GPQA", 0, "acc_norm", "Idavidrein/gpqa (ask for access on its page)"),
            parts=lambda tasks: gpqa,
        ),
        _task("leaderboard_musr", "MuSR", 0, "acc_norm", "TAUR-Lab/MuSR", parts=lambda tasks: musr),
        _task("leaderboard_mmlu_pro", "MMLU-Pro", 5, "acc", "TIGER-Lab/MMLU-Pro", parts=lambda tasks: mmlu_pro),
    )
    return Suite("openllm-v2", "IFEval, BBH, MATH, GPQA, MuSR, MMLU-Pro as the second leaderboard", tasks)


def _task(
    name: str,
    column: str,
    shots: int,
    metric: str,
    needs: str,
    *,
    key: str | None = None,
    parts: Callable[[Mapping[str, TaskResult]], Sequence[ScorePart]] | None = None,
    extra: str | None = None,
    nltk: str | None = None,
    also: tuple[str, ...] = (),
) -> Task:
    """
    Args:
        column: the leaderboard's name.
        key: lm-eval's key of the metric, if it has a filter.
        parts: the raw scores that the leaderboard's is made of, from all that were found.
        extra, nltk, also: as for Task.
    """
    key = key or f"{metric},none"
    whole = [ScorePart(name, key)]

    def score(tasks: Mapping[str, TaskResult]) -> TaskResult:
        return combine(column, parts(tasks) if parts is not None else whole, tasks)

    return Task(name, name, key, needs, num_fewshot=shots, score=score, extra=extra, nltk=nltk, also=also)


def _mmlu(tasks: Mapping[str, TaskResult]) -> list[ScorePart]:
    """The subjects: tasks that are not groups."""
    groups = {result.group for result in tasks.values()}
    return [ScorePart(name, "acc,none") for name in tasks if name.startswith("mmlu") and name not in groups]


def combine(column: str, parts: Sequence[ScorePart], tasks: Mapping[str, TaskResult]) -> TaskResult:
    """The mean of the normalised parts, as a share of 1, with the standard error that those of the parts give."""
    values = [float(part.normalised(tasks[part.task].metrics[part.metric])) for part in parts]
    metrics = {f"{METRIC},none": math.fsum(values) / len(values)}
    errors = [_error(part, tasks[part.task]) for part in parts]
    known = [error for error in errors if error is not None]
    if len(known) == len(parts) == len({part.task for part in parts}):  # else not independent
        metrics[f"{METRIC}_stderr,none"] = math.sqrt(math.fsum(error**2 for error in known)) / len(parts)
    names = dict.fromkeys(part.task for part in parts)
    return TaskResult(
        name=column,
        group=None,
        metrics=metrics,
        metric=f"{METRIC},none",
        higher_is_better=True,
        n=sum(tasks[name].n for name in names),
        version="/".join(dict.fromkeys(tasks[name].version for name in names)),
        parts=tuple(parts),
    )


def _error(part: ScorePart, result: TaskResult) -> float | None:
    name, _, filter_name = part.metric.partition(",")
    error = result.metrics.get(f"{name}_stderr,{filter_name}")
    return None if error is None else error / (1 - part.chance)
