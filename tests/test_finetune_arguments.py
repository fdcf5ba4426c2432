"""What a config allows, the trainer takes: no combination of keys fails after the model was loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.arguments import arguments, intervals
from finetune.config import load_config
from finetune.keys import KEYS, Config
from merge.errors import RecipeError

WATCHING = ("eval_every", "save_every", "early_stopping", "keep_best", "validation", "log_every")
TRAINING = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "gradient_checkpointing", "learning_rate")
MORE = ("scheduler", "warmup", "optimizer", "weight_decay", "max_grad_norm", "seed", "train")


def values(name: str) -> st.SearchStrategy[Any]:
    key = KEYS[name]
    if key.choices:
        return st.sampled_from(key.choices)
    if key.kind == "bool":
        return st.booleans()
    if key.kind == "int":
        return st.integers(int(key.low or 0), 300)
    low = 1e-4 if key.above is not None or name == "validation" else float(key.low or 0)
    return st.floats(low, 0.9 if name == "validation" else min(key.high or 20.0, 20.0))


CONFIGS = st.fixed_dictionaries({}, optional={name: values(name) for name in (*WATCHING, *TRAINING, *MORE)})


def prepared(config: Config, rows: int) -> Any:
    held = [] if config.validation is None else [0]
    return SimpleNamespace(config=config, data=SimpleNamespace(train=range(rows), validation=held or None))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=CONFIGS, rows=st.integers(1, 2000))
def test_every_config_that_is_allowed_makes_the_trainers_arguments(
    tmp_path: Path, keys: dict[str, Any], rows: int
) -> None:
    flags = {name: [str(value).lower() if isinstance(value, bool) else str(value)] for name, value in keys.items()}
    try:
        config = load_config(None, {"model": ["m"], "data": ["d.jsonl"], "out": ["o"], **flags})
    except RecipeError:
        return  # said before anything is loaded
    made = arguments(prepared(config, rows), "cpu", tmp_path)
    assert made.max_steps >= 1
    if made.load_best_model_at_end:
        assert made.save_steps % made.eval_steps == 0


@pytest.mark.parametrize(
    ("keys", "epoch", "steps", "expected"),
    [
        ({}, 10, 30, (10, 10)),
        ({}, 100, 30, (30, 30)),
        ({"save_every": 7}, 10, 30, (10, 7)),  # nothing is validated: checkpoints alone
        ({"save_every": 7, "validation": 0.1}, 10, 30, (7, 7)),
        ({"save_every": 7, "validation": 0.1, "keep_best": False}, 10, 30, (10, 7)),
        ({"save_every": 12, "eval_every": 4, "validation": 0.1}, 10, 30, (4, 12)),
        ({"save_every": 100, "eval_every": 4, "validation": 0.1}, 10, 30, (4, 32)),
        ({"save_every": 100, "validation": 0.1}, 10, 30, (30, 30)),
    ],
)
def test_intervals(keys: dict[str, Any], epoch: int, steps: int, expected: tuple[int, int]) -> None:
    assert intervals(Config(**keys), epoch, steps) == expected
