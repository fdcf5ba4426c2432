"""core_code: functions to be written from their docstrings, judged by what they return (eval/sandbox)."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from eval.tasks.core.config import Dataset, rows, task_config
from eval.tasks.task import Task

_MAX_TOKENS = 96  # of an answer
# What a function cannot go on with: the next thing at the left margin.
_END = ["\ndef", "\nclass", "\nassert", "\nprint", "\nif", "\n#", "\n```", "\n@"]
_IMPORTS = "from __future__ import annotations\nimport collections\nimport math\nimport re\nfrom typing import *\n\n\n"


def code_task() -> Task:
    config = task_config(
        "core_code",
        Dataset(problems),
        {"pass@1": True},
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{tests}}",
        process_results=check,
        generation_kwargs={"until": _END, "max_gen_toks": _MAX_TOKENS, "do_sample": False},
        unsafe_code=True,
    )
    return Task("core_code", config, "pass@1", num_fewshot=0, guard=_guard)


def _guard() -> tuple[str, ...]:
    from eval.sandbox import guard

    return guard()


def problems() -> list[dict[str, str]]:
    """name, prompt (a function up to the end of its docstring), solution (the rest of it), tests.

    A test is `assert name(arguments) == value` or `is value`, with literals: it is read as data, and floats may differ
    by 1e-9. The line break after the docstring belongs to the solution: tokenizers join it with the indentation that
    follows, and models asked to go on from a lone one write no code.
    """
    return rows("functions")


def expectations(tests: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Arguments and value of each `assert name(arguments) == value`."""
    found = []
    for node in ast.parse(tests).body:
        match node:
            case ast.Assert(test=ast.Compare(left=ast.Call(args=arguments), comparators=[value])):
                found.append((tuple(map(ast.literal_eval, arguments)), ast.literal_eval(value)))
            case _:
                raise ValueError(f"not a call and a value: {ast.unparse(node)}")
    return found


def check(problem: Mapping[str, str], answers: Sequence[str]) -> dict[str, float]:
    """Whether the function that the model finished returns what its tests say."""
    from eval.sandbox import returned
    from eval.sandbox.inside.values import encode, same

    expected = expectations(problem["tests"])
    program = f"{_IMPORTS}{problem['prompt']}{answers[0]}\n"
    found = returned(program, problem["name"], [arguments for arguments, _ in expected])
    right = len(found) == len(expected) and all(
        same(encode(value), each) for (_, value), each in zip(expected, found, strict=True)
    )
    return {"pass@1": float(right)}
