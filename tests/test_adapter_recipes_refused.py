"""Recipes of adapters that cannot be followed, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_adapters
from random_adapters import PREFIX, plan, write_adapter
from safetensors.numpy import load_file, save_file

from merge import run_plan
from merge.errors import MergeError, NumbersError, RecipeError

two = random_adapters.two  # fixture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "is a DoRA adapter .* whose change depends on the base's weights .* Fold it: list BASE"),
        ({"base_model_name_or_path": "org/other"}, "trained on different bases .*org/other.*different_bases"),
        ({"shapes": {"model.layers.0.mlp.up_proj": (32, 8)}}, "up_proj: adapters change matrices of different kinds"),
        ({"fan_in_fan_out": True}, "up_proj: adapters change matrices of different kinds: .*fan_in_fan_out"),
    ],
)
def test_adapters_that_do_not_belong_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    a, b = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2, **change)
    with pytest.raises(RecipeError, match=message):
        plan("cat", [a, b])
    if "base_model_name_or_path" in change:
        assert plan("cat", [a, b], allow=["different_bases"]).n_parameters


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("cat", {"parameters": {"rank": 4}}, "cat keeps all of the adapters"),
        ("ties", {"parameters": {"weight": 1, "trim": "model"}}, "trim: model"),
        ("linear", {"parameters": {"weight": 1}, "align": "permutation"}, '"align" is for whole models'),
        ("linear", {"parameters": {"weight": 1}, "tokenizer_source": "base"}, '"tokenizer_source" is for whole models'),
        ("karcher", {}, "karcher does not merge LoRA adapters.* These do: .*cat.*svd"),
        ("linear", {"parameters": {"weight": 0}}, "sum to zero"),
        ("svd", {"parameters": {"rank": -1}}, '"rank" must be at least 0'),
    ],
)
def test_recipes_that_adapters_cannot_follow(
    tmp_path: Path, two: tuple[Path, Path], method: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(method, list(two), **more)


def test_models_and_adapters_are_not_mixed(
    tmp_path: Path, two: tuple[Path, Path], make_model: Callable[..., Path]
) -> None:
    base = make_model(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"a is a LoRA adapter, and not all .* \"BASE\+"):
        plan("linear", [base, two[0]], parameters={"weight": 1})
    with pytest.raises(RecipeError, match=r"knots merges LoRA adapters, and .*base is not one"):
        plan("knots", [base, base])
    with pytest.raises(RecipeError, match=r'"rank" is that of a resulting adapter'):
        plan("linear", [base, base], parameters={"weight": 1, "rank": 4})
    wrong = make_model(tmp_path / "wrong", hidden=8)
    with pytest.raises(RecipeError, match=r"the adapters change a matrix of \[32, 16\], and .*wrong has \[16, 8\]"):
        plan("ties", list(two), base_model=str(wrong), parameters={"weight": 1})
    with pytest.raises(RecipeError, match="the base is listed with a weight, but it is not an adapter"):
        plan("linear", [base, *two], base_model=str(base), parameters={"weight": 1})
    assert plan("ties", [base, *two], base_model=str(base), parameters={"weight": 1}).steps[0].models == (1, 2)
    given = plan("linear", list(two), base_model=str(base), parameters={"weight": 1})
    assert (given.base_model, [len(step.inputs) for step in given.steps]) == (0, [2] * 8)


def test_a_number_that_is_none_stops_the_run(tmp_path: Path, two: tuple[Path, Path]) -> None:
    file = two[0] / "adapter_model.safetensors"
    tensors = {name: values.copy() for name, values in load_file(file).items()}
    tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, file)
    for method in ("cat", "svd"):
        with pytest.raises(NumbersError, match="up_proj"):
            run_plan(plan(method, list(two)), tmp_path / method)
    assert not (tmp_path / "svd").exists()


def test_what_cannot_be_opened_is_all_told(tmp_path: Path, two: tuple[Path, Path]) -> None:
    for path in two:
        (path / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeError) as caught:
        plan("cat", list(two))
    assert str(caught.value).count("none of adapter_model.safetensors") == 2
