"""Outputs, disks, options, and sources that change while they are read."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

from bad_inputs.room import LINEAR, Arguments, Room, set_up


class NotPossibleError(Exception):
    """This machine cannot make the case; says why."""


# --- where the result goes ---------------------------------------------------------------------------------------


def _to(room: Room, *more: str) -> Arguments:
    """A good recipe, with other arguments behind `merge run r.yaml`."""
    room.pair_and_recipe()
    return ["run", "r.yaml", *more]


@set_up
def output_below_a_file(room: Room) -> Arguments:
    (room.path / "file").write_text("")
    return _to(room, "-o", "file/out")


@set_up
def output_in_proc(room: Room) -> Arguments:
    if not Path("/proc/self").exists():
        raise NotPossibleError("there is no /proc")
    return _to(room, "-o", "/proc/out")


@set_up
def output_on_read_only_disk(room: Room) -> Arguments:
    mount(room, "1m", read_only=True)
    return _to(room, "-o", "disk/out")


@set_up
def disk_too_small(room: Room) -> Arguments:
    mount(room, "8k")
    return _to(room, "-o", "disk/out")


@set_up
def disk_fills_up(room: Room) -> Arguments:
    disk = mount(room, "200k")
    room.during_the_run(lambda: _fill(disk))
    return _to(room, "-o", "disk/out")


@set_up
def disk_fills_up_at_the_end(room: Room) -> Arguments:
    arguments = _to(room, "-o", "disk/out", "--shard-size", "10kB")
    mount(room, "60k")
    (room.path / "a" / "tokenizer.json").write_text('{"a": "' + "x" * 40_000 + '"}')
    return arguments


@set_up
def file_too_large(room: Room) -> Arguments:
    arguments = _to(room, "-o", "out")
    room.run_before(["run", "r.yaml", "-o", "warm", "--quiet"])  # compiled kernels are files too
    limit("RLIMIT_FSIZE", 6000, room)
    return arguments


@set_up
def output_exists(room: Room) -> Arguments:
    (room.path / "out").mkdir()
    (room.path / "out" / "thesis.txt").write_text("precious")
    return _to(room, "-o", "out")


@set_up
def output_is_a_file(room: Room) -> Arguments:
    (room.path / "out").write_text("precious")
    return _to(room, "-o", "out")


@set_up
def output_is_a_file_forced(room: Room) -> Arguments:
    (room.path / "out").write_text("precious")
    return _to(room, "-o", "out", "--force")


@set_up
def output_is_a_link(room: Room) -> Arguments:
    (room.path / "elsewhere").mkdir()
    (room.path / "out").symlink_to("elsewhere")
    return _to(room, "-o", "out", "--force")


@set_up
def force_over_inputs(room: Room) -> Arguments:
    room.model("models/a", seed=1)
    room.model("models/b", seed=2, like=1)
    room.recipe(LINEAR.replace("model: a", "model: models/a").replace("model: b", "model: models/b"))
    return ["run", "r.yaml", "-o", "models", "--force"]


@set_up
def endless_output_name(room: Room) -> Arguments:
    return _to(room, "-o", "x" * 300)


@set_up
def work_of_another_recipe(room: Room) -> Arguments:
    unfinished(room)
    (room.path / "r.yaml").write_text(LINEAR.replace("0.5", "0.6", 1))
    return ["run", "r.yaml", "-o", "out"]


@set_up
def work_of_another_recipe_forced(room: Room) -> Arguments:
    unfinished(room, "--shard-size", "1kB")
    room.watch = False
    return ["run", "r.yaml", "-o", "out", "--force"]


@set_up
def partial_is_somebody_s(room: Room) -> Arguments:
    (room.path / "out.partial").mkdir()
    (room.path / "out.partial" / "thesis.txt").write_text("precious")
    return _to(room, "-o", "out")


@set_up
def partial_is_a_file(room: Room) -> Arguments:
    (room.path / "out.partial").write_text("precious")
    return _to(room, "-o", "out")


@set_up
def second_run(room: Room) -> Arguments:
    arguments = _to(room, "-o", "out")
    (room.path / "out.partial").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, "out.partial/run.lock"], cwd=room.path, stdin=-1, stdout=-1, text=True
    )
    room.stack.enter_context(holder)
    room.stack.callback(holder.communicate)  # closes its standard input, which ends it
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return arguments


_HOLD = textwrap.dedent("""
    import sys, filelock
    with filelock.FileLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
""")


# --- sources that change -----------------------------------------------------------------------------------------


@set_up
def source_written_again(room: Room) -> Arguments:
    weights = room.path / "b" / "model.safetensors"
    room.during_the_run(lambda: os.utime(weights, (1, 1)))
    return _to(room, "-o", "out")


@set_up
def source_cut_short(room: Room) -> Arguments:
    weights = room.path / "b" / "model.safetensors"
    room.during_the_run(lambda: os.truncate(weights, 500))
    return _to(room, "-o", "out")


@set_up
def source_deleted(room: Room) -> Arguments:
    room.during_the_run(lambda: (room.path / "b" / "model.safetensors").unlink())
    return _to(room, "-o", "out")


@set_up
def tokenizer_deleted(room: Room) -> Arguments:
    from merge.engine import run

    read = run.side_file_bytes

    def then(plan: Any) -> dict[str, bytes]:
        (room.path / "a" / "tokenizer.json").unlink()
        return read(plan)

    room.watch = False
    room.patch("merge.engine.run.side_file_bytes", then)
    return _to(room, "-o", "out")


@set_up
def source_replaced_since_kill(room: Room) -> Arguments:
    _replace_source(room)
    return ["run", "r.yaml", "-o", "out"]


@set_up
def source_replaced_since_kill_forced(room: Room) -> Arguments:
    _replace_source(room)
    room.watch = False
    return ["run", "r.yaml", "-o", "out", "--force"]


@set_up
def source_copied_since_kill(room: Room) -> Arguments:
    unfinished(room, steps=10)
    shutil.copyfile(room.path / "b" / "model.safetensors", room.path / "copy")
    os.replace(room.path / "copy", room.path / "b" / "model.safetensors")
    room.watch = False
    return ["run", "r.yaml", "-o", "out"]


@set_up
def source_replaced_during_run(room: Room) -> Arguments:
    arguments = _to(room, "-o", "out")
    room.model("other", seed=9, like=1)
    room.during_the_run(lambda: _replace_b(room))
    return arguments


def _replace_source(room: Room) -> None:
    unfinished(room, steps=10)
    room.model("other", seed=9, like=1)
    _replace_b(room)


def _replace_b(room: Room) -> None:
    """b has the other model's weights, in a file of the size and mtime that its own had."""
    file = room.path / "b" / "model.safetensors"
    before = file.stat()
    os.replace(room.path / "other" / "model.safetensors", file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# --- options -----------------------------------------------------------------------------------------------------


@set_up
def memory_of_many_digits(room: Room) -> Arguments:
    return _to(room, "--max-ram", "9" * 400)


@set_up
def no_gpu(room: Room) -> Arguments:
    room.patch("torch.cuda.is_available", lambda: False)
    return _to(room, "--device", "cuda")


@set_up
def no_such_gpu(room: Room) -> Arguments:
    room.patch("torch.cuda.is_available", lambda: True)
    room.patch("torch.cuda.device_count", lambda: 1)
    return _to(room, "--device", "cuda:9")


@set_up
def out_of_memory(room: Room) -> Arguments:
    def fail() -> None:
        raise MemoryError

    room.during_the_run(fail)
    return _to(room, "-o", "out")


# --- helpers -----------------------------------------------------------------------------------------------------


def unfinished(room: Room, *options: str, steps: int = 0) -> None:
    """r.yaml and out.partial, as a run leaves it that is stopped after so many tensors."""
    from unittest import mock

    from bad_inputs.room import call
    from merge.engine import carry

    step, lock, done = carry._run_step, threading.Lock(), []

    def stop(*arguments: Any) -> None:
        with lock:  # tensors that other threads have begun are not finished either
            if len(done) == steps:
                raise KeyboardInterrupt
            step(*arguments)
            done.append(True)

    arguments = _to(room, "-o", "out", *options)
    with mock.patch("merge.engine.carry._run_step", stop):
        assert call(arguments)[0] == 130
    assert (room.path / "out.partial").is_dir()


def mount(room: Room, size: str, read_only: bool = False) -> Path:
    """A small tmpfs at `disk`, until the room is left."""
    disk = room.path / "disk"
    disk.mkdir()
    options = f"size={size}" + (",ro" if read_only else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if sys.platform != "linux" or shutil.which("mount") is None:
        raise NotPossibleError("needs a Linux mount")
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise NotPossibleError("mounting a tmpfs is not permitted")
    room.stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
    return disk


def limit(name: str, value: int, room: Room) -> None:
    """A limit of this process, until the room is left."""
    try:
        import resource
    except ImportError:
        raise NotPossibleError("there are no such limits on Windows") from None
    kind = getattr(resource, name)
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    room.stack.callback(resource.setrlimit, kind, (soft, hard))


def _fill(disk: Path) -> None:
    with (disk / "out.partial" / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
