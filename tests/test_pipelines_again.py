"""Pipelines run again: after a kill, a change or damage, only what has to be is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import stages
from bad_inputs.room import call
from stages import DIAMOND, how, two, weights

import merge.output.writer
from merge.errors import MergeError
from merge.jobs.pipelines.run import run_pipeline
from merge.planning.load import load_pipeline, parse_pipeline

family = stages.family  # fixture


def test_only_what_changed_is_done_again(family: Path, make_model: Callable[..., Path]) -> None:
    text = DIAMOND.format(root=family)
    options = {"keep_stages": True, "force": True}
    assert how(run_pipeline(parse_pipeline(text), family / "out", **options)) == ["written"] * 3 + ["result"]
    again = text.replace("t: 0.4", "t: 0.5")
    reports = run_pipeline(parse_pipeline(again), family / "out", **options)
    assert how(reports) == ["unchanged"] * 3 + ["result"]
    again = again.replace("weight: 3", "weight: 4")
    reports = run_pipeline(parse_pipeline(again), family / "out", **options)
    assert how(reports) == ["unchanged", "unchanged", "written", "result"]
    # a source of the first stage changes, so do all that are made from it
    make_model(family / "b", hidden=512, layers=1, dtype="BF16", base=family / "base", delta=0.003, seed=9)
    (family / "b" / "model.safetensors.index.json").unlink()
    for old in (family / "b").glob("model-0*"):
        old.unlink()
    assert how(run_pipeline(parse_pipeline(again), family / "out", **options)) == ["written"] * 3 + ["result"]
    run_pipeline(parse_pipeline(again), family / "fresh")
    assert weights(family / "fresh") == weights(family / "out")


def test_a_stage_that_was_tampered_with_is_made_again(family: Path) -> None:
    pipeline = parse_pipeline(two("linear", family))
    run_pipeline(pipeline, family / "out", keep_stages=True)
    shard = family / "out.stages" / "first" / "model.safetensors"
    times = shard.stat()
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert how(run_pipeline(pipeline, family / "out", keep_stages=True, force=True)) == ["unchanged", "result"]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert how(run_pipeline(pipeline, family / "out", keep_stages=True, force=True)) == ["written", "result"]


def test_cut_off_in_a_stage_it_goes_on_there(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = parse_pipeline(DIAMOND.format(root=family))
    options = {"keep_stages": True, "threads": 1}
    run_pipeline(pipeline, family / "whole", **options)
    finish = merge.output.writer.OutputDirectory.finish
    for cut in (5, 19, 15):
        left = [cut]

        def failing(self: object, index: int, record: dict[str, object], left: list[int] = left) -> None:
            if not left[0]:
                raise MergeError("stop")
            left[0] -= 1
            finish(self, index, record)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(merge.output.writer.OutputDirectory, "finish", failing)
            with pytest.raises(MergeError, match="stop"):
                run_pipeline(pipeline, family / "cut", **options)
        assert not (family / "cut").exists()
    reports = run_pipeline(pipeline, family / "cut", **options)
    resumed = [report.report.resumed_tensors for report in reports if report.report is not None]
    assert sum(resumed) > 0
    assert weights(family / "cut") == weights(family / "whole")


def test_killed_it_goes_on(family: Path) -> None:
    recipe = family / "pipeline.yaml"
    recipe.write_text(DIAMOND.format(root=family))
    run_pipeline(load_pipeline(recipe), family / "whole")
    arguments = ["run", str(recipe), "-o", str(family / "cut"), "--keep-stages", "--quiet"]
    stopped_run = [sys.executable, str(Path(__file__).with_name("stopped_run.py")), str(int(signal.SIGKILL)), "3"]
    for stage in ("root", "right"):
        assert subprocess.run([*stopped_run, stage, *arguments]).returncode == -signal.SIGKILL
        assert not (family / "cut").exists()
    assert call(arguments)[0] == 0
    assert weights(family / "cut") == weights(family / "whole")
