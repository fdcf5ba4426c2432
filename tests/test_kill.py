"""kill -9, Ctrl-C and SIGTERM at any moment: started again, the run goes on and gives the same bytes.

`make test` does it a few times on small models; `make test-full` fifty times on models of 60 MB.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bad_inputs.room import Room, call

from merge import build_plan, load_recipe

STOPPED_RUN = Path(__file__).with_name("stopped_run.py")
JOURNAL = "journal.jsonl"
STOPPED = "merge: Interrupted. Finished work is kept; run the same command to resume.\n"
RECIPE = """\
merge_method: dare_ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.6, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: [0.2, 0.8]}
seed: 7
"""


class Work(NamedTuple):
    """A recipe in a folder, and the contents of an uninterrupted result."""

    root: Path
    expected: dict[str, bytes]
    seconds: float  # from the opening of the output to its renaming
    nbytes: int

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(command("out"), cwd=self.root, text=True, stdout=-1, stderr=-1)

    def stop(self, number: signal.Signals, steps: int) -> subprocess.CompletedProcess[str]:
        """Starts the run, which gets a signal once so many steps are done."""
        stopped = [sys.executable, str(STOPPED_RUN), str(int(number)), str(steps), "r"]
        return subprocess.run(
            [*stopped, *command("out")[3:]], cwd=self.root, capture_output=True, text=True, timeout=300
        )

    def finish(self) -> dict[str, Any]:
        """Starts the run again, to its end; compares the result byte for byte and removes it. Returns the report."""
        done = subprocess.run(command("out"), cwd=self.root, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(self.root / "out") == self.expected
        assert not (self.root / "out.partial").exists()
        shutil.rmtree(self.root / "out")
        return dict(json.loads(done.stdout))


def command(out: str) -> list[str]:
    return [sys.executable, "-m", "merge", "run", "r.yaml", "-o", out, "--quiet", "--json", "--shard-size", "20MB"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def prepare(root: Path, hidden: int, layers: int) -> Work:
    root.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        room = Room(root, stack)
        for seed, name in enumerate(("base", "a", "b")):
            room.model(name, seed=seed, like=0 if seed else None, hidden=hidden, layers=layers, dtype="BF16")
        room.recipe(RECIPE)
    done = subprocess.run(command("whole"), cwd=root, check=True, capture_output=True)
    report = json.loads(done.stdout)
    expected = contents(root / "whole")
    assert "merge_manifest.json" in expected
    assert JOURNAL not in expected
    return Work(root, expected, report["seconds"], report["bytes_written"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return prepare(tmp_path_factory.mktemp("small"), hidden=256, layers=6)


@pytest.fixture
def small(prepared: Work) -> Iterator[Work]:
    """Models of 6 MB, and no output yet."""
    yield prepared
    for name in ("out", "out.partial"):
        shutil.rmtree(prepared.root / name, ignore_errors=True)


def finished_steps(root: Path) -> set[int]:
    """Steps of which the journal of the unfinished run says that they are done."""
    try:
        lines = (root / "out.partial" / JOURNAL).read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        lines = []
    return {json.loads(line)[1]["step"] for line in lines}


def wait_for(work: Work, process: subprocess.Popen[str], steps: int) -> None:
    """Returns when the output is open and so many steps are done, or when the run has ended."""
    while process.poll() is None:
        if (work.root / "out.partial" / JOURNAL).exists() and len(finished_steps(work.root)) >= steps:
            return
        time.sleep(0.001)


def test_a_run_killed_three_times_gives_the_same_bytes(small: Work) -> None:
    for steps in (1, 15, 30):
        assert small.stop(signal.SIGKILL, steps).returncode == -signal.SIGKILL
        assert not (small.root / "out").exists()
        assert len(finished_steps(small.root)) >= steps
    done = len(finished_steps(small.root))
    assert small.finish()["resumed_tensors"] == done


def test_a_stopped_run_says_so_and_goes_on(small: Work) -> None:
    for number, code, steps in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 20)):
        done = small.stop(number, steps)
        assert (done.returncode, done.stdout, done.stderr.lstrip("\n")) == (code, "", STOPPED)  # click ends a ^C's line
        assert not (small.root / "out").exists()
    assert small.finish()["resumed_tensors"] >= 20


@pytest.mark.parametrize(
    ("command", "stopped_in", "kept"),
    [
        (["verify", "made"], "merge.output.verify.stored_digest", False),
        (["plan", "r.yaml"], "merge.jobs.pipelines.plan.build_plan", False),
        (["diff", "a", "b"], "merge.tools.diff.diff_models", False),
        (["run", "r.yaml", "-o", "out"], "merge.jobs.pipelines.plan.build_plan", False),
        (["run", "r.yaml", "-o", "out"], "merge.engine.run.check_models", True),
        (["convert", "a", "-o", "out"], "merge.engine.run.check_models", True),
        (["lora", "extract", "b", "--base", "a", "-o", "out"], "merge.tools.extract.run.Work.run", True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_interrupted_command_says_whether_it_kept_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], stopped_in: str, kept: bool
) -> None:
    def stop(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        arguments = Room(tmp_path, stack).pair_and_recipe()
    assert call([*arguments[:2], "-o", "made"])[0] == 0
    monkeypatch.setattr(stopped_in, stop)
    code, out, err = call(command)
    assert (code, out) == (130, "")
    assert err.lstrip("\n") == (STOPPED if kept else "merge: Interrupted.\n")
    assert (tmp_path / "out.partial").exists() == kept


def test_nothing_is_lost_just_before_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        arguments = [*Room(tmp_path, stack).pair_and_recipe(), "--json"]

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("merge.output.workspace.Workspace._place", stop)
        assert call(arguments)[0] == 130
    code, out, _ = call(arguments)
    report = json.loads(out)
    assert (code, report["resumed_tensors"]) == (0, report["tensors"])
    assert not (tmp_path / "out" / JOURNAL).exists()


def lost_seconds(work: Work) -> float:
    """What a kill wasted: bytes written for tensors that the journal does not have, in seconds of an ordinary run."""
    if not (work.root / "out.partial" / JOURNAL).exists():
        return 0.0
    with contextlib.chdir(work.root):
        plan = build_plan(load_recipe("r.yaml"), shard_bytes=20_000_000)
    finished = finished_steps(work.root)
    lost = 0
    for index, step in enumerate(plan.steps):
        path = work.root / "out.partial" / "result" / step.file
        if index not in finished and path.exists():
            written = np.fromfile(path, np.uint8, step.nbytes, offset=step.offset)
            lost += int(np.flatnonzero(written)[-1:].sum())  # files begin as zeros
    return lost / work.nbytes * work.seconds


@pytest.mark.full
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    prepare(tmp_path / "compile", hidden=64, layers=2)
    work = prepare(tmp_path / "work", hidden=512, layers=14)
    n_steps = len(json.loads(work.expected["merge_manifest.json"])["tensors"])
    random_moment = random.Random(1)
    lost, resumed = [], []
    for _ in range(50):
        kills = 1 + (random_moment.random() < 0.3)  # some are killed again while they go on
        for _ in range(kills):
            process = work.start()
            if random_moment.random() < 0.3:
                time.sleep(random_moment.uniform(0, 2 + work.seconds))  # also while it starts
            else:
                wait_for(work, process, random_moment.randrange(n_steps))
                time.sleep(random_moment.uniform(0, 0.03))
            process.kill()
            process.communicate()
            lost.append(lost_seconds(work))
            if (work.root / "out").exists():
                break
        if (work.root / "out").exists():
            assert contents(work.root / "out") == work.expected
            shutil.rmtree(work.root / "out")
        else:
            resumed.append(work.finish()["resumed_tensors"])
    print(f"\n{len(lost)} kills, {len(resumed)} resumed, of them {sum(n > 0 for n in resumed)} with tensors done;")
    print(f"work lost: at most {max(lost):.3f} s, {sum(lost) / len(lost):.3f} s on average")
    assert max(lost) < 1
    assert sum(n > 0 for n in resumed) >= 20
