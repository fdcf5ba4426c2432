"""Pipelines: streamed or written, the last stage is what separate runs would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
from bad_inputs.room import call
from stages import DIAMOND, FIRST, LAST, first_text, how, two, weights

from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.engine.memory import budget
from merge.errors import NumbersError, UsageError
from merge.jobs.pipelines.plan import PipelinePlanner, not_by_blocks
from merge.jobs.pipelines.run import run_pipeline
from merge.plan import Derived, Plan
from merge.planning.load import parse_pipeline
from merge.recipe.model import Recipe
from merge.sources import held_bytes

family = stages.family  # fixture


def separately(root: Path, method: str, dtype: str = "bfloat16") -> dict[str, bytes]:
    run_plan(build_plan(parse_recipe(first_text(method, root, dtype))), root / "step-1")
    run_plan(build_plan(parse_recipe(LAST.format(root=root, first=root / "step-1"))), root / "step-2")
    return weights(root / "step-2")


@pytest.mark.parametrize("method", FIRST)
def test_streamed_is_the_same_as_by_way_of_the_disk(family: Path, method: str) -> None:
    reports = run_pipeline(parse_pipeline(two(method, family)), family / "out")
    assert how(reports) == ["streamed", "result"]
    assert sorted(path.name for path in family.iterdir() if "out" in path.name) == ["out"]
    assert weights(family / "out") == separately(family, method)
    assert verify_output(family / "out").problems == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn"])
def test_a_stage_is_rounded_to_its_own_dtype(family: Path, dtype: str) -> None:
    run_pipeline(parse_pipeline(two("linear", family, dtype)), family / "out")
    assert weights(family / "out") == separately(family, "linear", dtype)


def test_threads_and_memory_do_not_change_a_byte(family: Path) -> None:
    pipeline = parse_pipeline(two("ties", family))
    for threads, ram in ((1, None), (3, None), (2, 260 << 20)):
        run_pipeline(pipeline, family / f"out-{threads}", threads=threads, max_ram=ram)
    assert weights(family / "out-1") == weights(family / "out-3") == weights(family / "out-2")


def test_kept_stages_are_written_and_give_the_same(family: Path) -> None:
    pipeline = parse_pipeline(two("ties", family))
    run_pipeline(pipeline, family / "streamed")
    reports = run_pipeline(pipeline, family / "kept", keep_stages=True, stages_dir=family / "stages")
    assert how(reports) == ["written", "result"]
    assert weights(family / "kept") == weights(family / "streamed")
    assert verify_output(family / "stages" / "first").problems == ()
    manifest = json.loads((family / "kept" / "merge_manifest.json").read_text())
    assert [(stage["name"], stage["written"]) for stage in manifest["stages"]] == [("first", True)]


def test_a_diamond(family: Path) -> None:
    text = DIAMOND.format(root=family)
    reports = run_pipeline(parse_pipeline(text, "shape.yaml"), family / "out")
    assert how(reports) == ["streamed", "streamed", "streamed", "result"]
    places = {name: family / f"by-hand-{name}" for name in ("root", "left", "right", "out")}
    for (name, place), document in zip(places.items(), text.split("---"), strict=True):
        for earlier in ("root", "left", "right"):
            document = document.replace(f"model: {earlier}", f"model: {places[earlier]}")
        run_plan(build_plan(parse_recipe(document)), place)
        assert name in str(place)
    assert weights(family / "out") == weights(places["out"])
    manifest = json.loads((family / "out" / "merge_manifest.json").read_text())
    assert manifest["recipe"] == text
    assert (family / "out" / "merge_recipe.yaml").read_text() == text
    assert [stage["name"] for stage in manifest["stages"]] == ["root", "left", "right"]
    assert [model["model"] for model in manifest["stages"][2]["models"]] == ["root", str(family / "c")]
    assert manifest["stages"][0]["models"][0]["files"] == {
        "model.safetensors": (family / "a/model.safetensors").stat().st_size
    }


def test_what_several_passes_make_for_several_others_is_written(family: Path) -> None:
    text = DIAMOND.format(root=family).replace(
        "merge_method: linear\nmodels: [{model: "
        + str(family / "a")
        + "}, {model: "
        + str(family / "b")
        + "}]\nparameters: {weight: 1}",
        first_text("ties", family).strip(),
        1,
    )
    reports = run_pipeline(parse_pipeline(text), family / "out")
    assert how(reports) == ["written", "streamed", "streamed", "result"]
    assert not (family / "out.stages").exists()


def test_a_named_stage_that_nothing_uses_is_a_result_too(family: Path) -> None:
    text = f"name: aside{first_text('linear', family)}---\nname: main{first_text('ties', family)}"
    reports = run_pipeline(parse_pipeline(text), family / "merged" / "main")
    assert [report.directory for report in reports] == [str(family / "merged" / name) for name in ("aside", "main")]
    assert verify_output(family / "merged" / "aside").problems == ()
    assert sorted(path.name for path in (family / "merged").iterdir()) == ["aside", "main"]
    assert (
        family / "merged" / "aside" / "merge_recipe.yaml"
    ).read_text() == f"name: aside{first_text('linear', family)}"
    with pytest.raises(UsageError, match="aside exists"):
        run_pipeline(parse_pipeline(text), family / "merged" / "other")
    assert not (family / "merged" / "other").exists()


def test_nothing_is_begun_if_the_end_cannot_be_written(family: Path) -> None:
    (family / "out").mkdir()
    (family / "out" / "mine").write_text("")
    with pytest.raises(UsageError, match="out exists; nothing was changed"):
        run_pipeline(parse_pipeline(two("linear", family)), family / "out", keep_stages=True)
    assert not (family / "out.stages").exists()
    (family / "stages" / "first").mkdir(parents=True)
    with pytest.raises(UsageError, match="first exists and was not made by a pipeline"):
        run_pipeline(
            parse_pipeline(two("linear", family)), family / "new", keep_stages=True, stages_dir=family / "stages"
        )
    assert list((family / "stages").iterdir()) == [family / "stages" / "first"]
    with pytest.raises(UsageError, match=r"is inside .*new, where the result will be"):
        run_pipeline(parse_pipeline(two("linear", family)), family / "new", stages_dir=family / "new" / "stages")
    with pytest.raises(UsageError, match="two stages would be written there"):
        run_pipeline(
            parse_pipeline(two("linear", family)), family / "s" / "first", keep_stages=True, stages_dir=family / "s"
        )


def test_numbers_of_a_streamed_stage_are_judged_by_its_own_leniency(
    family: Path, make_model: Callable[..., Path]
) -> None:
    bad = np.full(512, np.nan, np.float32)
    huge = {"model.norm.weight": bad}
    make_model(family / "b", hidden=512, layers=1, dtype="BF16", base=family / "base", delta=0.002, seed=2, extra=huge)
    text = two("linear", family) + "allow: [nonfinite]\n"
    (family / "b" / "model.safetensors.index.json").unlink()
    for old in (family / "b").glob("model-0*"):
        old.unlink()
    with pytest.raises(NumbersError, match=r"model.norm.weight, on the way to first: NaN .* 512 in .*/b"):
        run_pipeline(parse_pipeline(text), family / "out")
    allowed = text.replace("---", "allow: [nonfinite]\n---")
    reports = run_pipeline(parse_pipeline(allowed), family / "out-2")
    assert how(reports) == ["streamed", "result"]
    extra = {"model.norm.weight": np.full(512, 3e38, np.float32)}
    make_model(family / "b", hidden=512, layers=1, dtype="BF16", base=family / "base", delta=0.002, seed=2, extra=extra)
    with pytest.raises(NumbersError, match=r"on the way to first: 512 values .* do not fit F16"):
        run_pipeline(parse_pipeline(two("linear", family, "float16")), family / "out-3")


def test_a_base_that_is_none_is_seen_in_a_streamed_stage(family: Path, make_model: Callable[..., Path]) -> None:
    make_model(family / "base", hidden=512, layers=1, dtype="BF16", seed=77)
    text = two("ties", family) + "allow: [unrelated_base]\n"
    with pytest.raises(NumbersError, match=r"a is not a fine-tune of .*/base"):
        run_pipeline(parse_pipeline(text), family / "out")


def test_integers_need_the_disk_and_alignment_too(family: Path, make_model: Callable[..., Path]) -> None:
    for name in ("base", "a", "b", "c"):
        seed = "base abc".index(name[0])
        kind = {"base": family / "base", "delta": 0.002} if name != "base" else {}
        make_model(family / name, layers=1, dtype="BF16", seed=seed, extra={"ids": np.arange(5)}, **kind)
        for old in (family / name).glob("model*-0*"):
            old.unlink()
        (family / name / "model.safetensors.index.json").unlink(missing_ok=True)
    (first, _) = PipelinePlanner(parse_pipeline(two("linear", family)), family / "out").planned
    assert (first.how, first.reason) == ("written", "ids must be equal in all its models")
    reports = run_pipeline(parse_pipeline(two("linear", family)), family / "out")
    assert how(reports) == ["written", "result"]
    assert not (family / "out.stages").exists()


def test_what_a_kernel_alone_cannot_do_is_written(family: Path) -> None:
    """Whatever else a plan may come to say is not lost by streaming."""
    plan = build_plan(parse_recipe(first_text("linear", family)))
    assert not_by_blocks(plan) == ""
    assert not_by_blocks(replace(plan, notes_rounding=True)) == "it needs more than a kernel for each tensor"
    trims = first_text("ties", family).replace("[0.3, 0.8]", "0.3") + "parameters: {trim: model}\n"
    found = not_by_blocks(build_plan(parse_recipe(trims)))
    assert found == "ties with trim: model looks at the whole model first"
    matrices = first_text("task_arithmetic", family).replace("task_arithmetic", "tsv").replace("-0.4", "0.4")
    assert not_by_blocks(build_plan(parse_recipe(matrices))) == "tsv needs whole tensors"


def test_a_stage_of_whole_tensors_is_written(family: Path) -> None:
    first = first_text("task_arithmetic", family).replace("task_arithmetic", "tsv").replace("-0.4", "0.4")
    pipeline = parse_pipeline(f"name: first{first}---{LAST.format(root=family, first='first')}")
    assert how(run_pipeline(pipeline, family / "out")) == ["written", "result"]
    run_plan(build_plan(parse_recipe(first)), family / "step-1")
    run_plan(build_plan(parse_recipe(LAST.format(root=family, first=family / "step-1"))), family / "step-2")
    assert weights(family / "out") == weights(family / "step-2")


def test_the_plan_survives_json_and_counts_memory(family: Path) -> None:
    planner = PipelinePlanner(parse_pipeline(two("ties", family)), family / "out")
    first, last = planner.planned
    assert Plan.from_json(last.plan.to_json()) == last.plan
    assert (first.how, last.how) == ("streamed", "result")
    step = max(last.plan.steps, key=lambda step: step.size)
    streamed = next(ref for ref in step.inputs if isinstance(ref, Derived))
    assert held_bytes(streamed) > 3 * 4 * (1 << 17)
    alone = build_plan(parse_recipe(LAST.format(root=family, first=family / "a")))
    assert budget(last.plan, 2, None).peak > budget(alone, 2, None).peak


def test_each_stage_is_planned_once_but_for_those_that_read_what_was_written(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []

    def counted(recipe: Recipe, **more: Any) -> Plan:
        planned.append(recipe.name or "last")
        return build_plan(recipe, **more)

    monkeypatch.setattr("merge.jobs.pipelines.plan.build_plan", counted)
    file = family / "pipeline.yaml"
    file.write_text(two("ties", family))
    assert call(["run", str(file), "-o", str(family / "out"), "--quiet"])[0] == 0
    assert planned == ["first", "last"]
    planned.clear()
    assert call(["run", str(file), "-o", str(family / "kept"), "--quiet", "--keep-stages"])[0] == 0
    assert planned == ["first", "last", "last"]


def test_one_document_is_a_pipeline_of_one_stage(family: Path) -> None:
    text = first_text("linear", family)
    (stage,) = parse_pipeline(text).stages
    assert (stage.recipe, stage.uses) == (parse_recipe(text), ())


def test_commands_take_pipelines(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    monkeypatch.setenv("COLUMNS", "200")
    recipe = family / "p.yaml"
    recipe.write_text(two("slerp", family))
    code, out, err = call(["plan", "p.yaml", "-o", "out"])
    assert (code, err) == (0, "")
    assert "stage 1 of 2, first: slerp" in out
    assert "streamed" in out
    assert "stage 2 of 2, p: ties" in out
    code, out, err = call(["plan", "p.yaml", "-o", "out", "--json", "--keep-stages"])
    stages = json.loads(out)["stages"]
    assert [(stage["name"], stage["how"], stage["uses"]) for stage in stages] == [
        ("first", "written", []),
        ("p", "result", ["first"]),
    ]
    assert Plan.from_json(json.dumps(stages[1]["plan"])).stages[0].name == "first"
    code, out, err = call(["run", "p.yaml", "-o", "out", "--keep-stages"])
    assert (code, "first: written to out.stages" in out) == (0, True), err
    code, out, err = call(["run", "p.yaml", "-o", "out", "--keep-stages", "--force", "--json"])
    assert [stage["unchanged"] for stage in json.loads(out)["stages"]] == [True, False]
    assert call(["verify", "out"])[0] == 0
    recipe.write_text(two("slerp", family).replace("model: first", "model: frist"))
    code, out, err = call(["plan", "p.yaml"])
    assert (code, out) == (2, "")
    assert 'did you mean "first"?' in err
