"""The memory of answers: asked once, by weights; shared by processes; never of NaN; kept when stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import judging
import numpy as np
import pytest
from judging import SOME, Run, judged, replace_weights

from eval.harness import evaluate
from eval.memory import Memory, key_of
from eval.models import subjects
from eval.settings import Settings
from eval.tasks import resolve
from merge.errors import NumbersError, SourceChanged, UsageError, is_kept

memory, tiny, choices = judging.memory, judging.tiny, judging.choices  # fixtures

ROOT = Path(__file__).resolve().parent.parent


def test_answers_go_by_weights_and_not_by_path(tmp_path: Path, tiny: Run, choices: Path, memory: Memory) -> None:
    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    tiny(tmp_path / "copy")
    first, copy = judged([tmp_path / "a", tmp_path / "copy"], tasks, memory).models
    assert (first.asked, copy.asked, copy.remembered) == (12, 0, 12)
    assert first.tasks == copy.tasks
    tiny(tmp_path / "a", seed=5)  # another model in the same place
    assert judged([tmp_path / "a"], tasks, memory).models[0].asked == 12
    assert judged([tmp_path / "a"], tasks, memory, dataclasses.replace(SOME, dtype="bfloat16")).models[0].asked == 12


def test_other_weights_with_the_size_and_mtime_of_the_old_ones_are_asked_again(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tmp_path / 'a'}}}]\n")
    before = judged([tmp_path / "a", recipe], tasks, memory).models
    replace_weights(tmp_path / "a", tiny(tmp_path / "other", seed=5))
    after = judged([tmp_path / "a", recipe], tasks, memory).models
    assert after[0].asked == 12
    assert (after[0].digest == before[0].digest, after[1].digest == before[1].digest) == (False, False)


def test_weights_that_change_during_an_evaluation(tmp_path: Path, tiny: Run, choices: Path, memory: Memory) -> None:
    tasks = resolve([str(choices)], None)
    other = tiny(tmp_path / "other", seed=5)
    before = judged([other], tasks, memory).models[0]
    tiny(tmp_path / "a")

    def change(model: str, task: str, done: int, total: int) -> None:
        if done == 4:
            replace_weights(tmp_path / "a", other)

    with pytest.raises(SourceChanged, match=r"a/model.safetensors: changed while the model was evaluated"):
        evaluate(subjects([str(tmp_path / "a")]), tasks, Settings(batch_size=1), memory, progress=change)
    after = judged([tmp_path / "a"], tasks, memory).models[0]
    assert (after.digest, after.remembered, after.tasks) == (before.digest, 12, before.tasks)


def test_an_evaluation_that_was_stopped_asks_only_the_rest(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    class Stop(BaseException):
        pass

    def stop(model: str, task: str, done: int, total: int) -> None:
        if done >= 9:
            raise Stop

    tasks = resolve([str(choices)], None)
    tiny(tmp_path / "a")
    settings = Settings(batch_size=1)
    with pytest.raises(Stop):
        evaluate(subjects([str(tmp_path / "a")]), tasks, settings, memory, progress=stop)
    rest = judged([tmp_path / "a"], tasks, memory, settings).models[0]
    assert (rest.asked, rest.remembered) == (7, 9)
    with Memory(tmp_path / "fresh.sqlite") as fresh:
        assert judged([tmp_path / "a"], tasks, fresh, settings).models[0].tasks == rest.tasks


WRITER = """
import sys
from eval.memory import Memory, key_of
with Memory(sys.argv[1]) as memory:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(400):
        memory.store(key_of(number), [number, True])
        assert memory.answers([key_of(number), key_of("none")]) == {key_of(number): [number, True]}
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, memory: Memory) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(memory.path)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            cwd=ROOT,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [(process.communicate(timeout=100)[1], process.returncode) for process in started] == [("", 0)] * 3
    keys = {key_of(number): [number, True] for number in range(400)}
    assert memory.answers(keys) == keys


@pytest.mark.full
def test_two_evaluations_at_once_share_a_cache(tmp_path: Path, tiny: Run, choices: Path) -> None:
    tiny(tmp_path / "a")
    command = [sys.executable, "-m", "merge", "eval", str(tmp_path / "a"), "--tasks", str(choices), "--json", "--quiet"]
    command += ["--cache", str(tmp_path / "shared.sqlite"), "--batch-size", "1"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    one, two = (json.loads(out)["models"][0]["tasks"] for out, _ in outputs)
    assert one == two
    with Memory(tmp_path / "shared.sqlite") as memory:
        found = judged([tmp_path / "a"], resolve([str(choices)], None), memory, Settings(batch_size=1)).models[0]
    assert (found.asked, found.remembered) == (0, 16)


def test_a_model_that_gives_nan_is_refused_and_not_remembered(
    tmp_path: Path, tiny: Run, choices: Path, memory: Memory
) -> None:
    bad = np.full((16,), np.nan, dtype=np.float32)
    tiny(tmp_path / "a", extra={"model.norm.weight": bad})
    tasks = resolve([str(choices)], None)
    for _ in range(2):
        with pytest.raises(NumbersError, match=r"choices: the model gives NaN for 'w\d w\d"):
            judged([tmp_path / "a"], tasks, memory)


def test_an_interrupted_evaluation_says_whether_answers_are_kept(tmp_path: Path) -> None:
    def interrupted(answers: int) -> None:
        with Memory(tmp_path / "answers.sqlite") as memory:
            memory.store_digest(b"file", "digest")
            for number in range(answers):
                memory.store(bytes([number]), "answer")
            raise KeyboardInterrupt

    for answers in (0, 2):
        with pytest.raises(KeyboardInterrupt) as stopped:
            interrupted(answers)
        assert is_kept(stopped.value) == bool(answers)


def test_the_cache_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be read as the head of one" * 20)
    with pytest.raises(UsageError, match=r"text: cannot be used to remember answers .* --cache"):
        Memory(tmp_path / "text")
    assert not os.path.exists(tmp_path / "text-wal")
