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

from bad_inputs.room import LINEAR, Arguments, Room, case


class NotPossibleError(Exception):
    """This machine cannot make the case; says why."""


# --- where the result goes ---------------------------------------------------------------------------------------


def _to(room: Room, *more: str) -> Arguments:
    """A good recipe, with other arguments behind `merge run r.yaml`."""
    room.pair_and_recipe()
    return ["run", "r.yaml", *more]


@case(
    "an output below a file",
    1,
    "file is not a directory that can be written to. Choose another --out",
    stops_early=True,
)
def output_below_a_file(room: Room) -> Arguments:
    (room.path / "file").write_text("")
    return _to(room, "-o", "file/out")


@case("an output in /proc", 1, "/proc", "choose another --out")
def output_in_proc(room: Room) -> Arguments:
    if not Path("/proc/self").exists():
        raise NotPossibleError("there is no /proc")
    return _to(room, "-o", "/proc/out")


@case("an output on a disk that is read-only", 1, "disk", "Choose another --out", stops_early=True)
def output_on_read_only_disk(room: Room) -> Arguments:
    mount(room, "1m", read_only=True)
    return _to(room, "-o", "disk/out")


@case("a disk that is too small", 1, "the result needs", "Make room, or choose another --out", stops_early=True)
def disk_too_small(room: Room) -> Arguments:
    mount(room, "8k")
    return _to(room, "-o", "disk/out")


@case("a disk that fills up during the run", 1, "disk/out.partial: the disk is full (", "run the same command again")
def disk_fills_up(room: Room) -> Arguments:
    disk = mount(room, "200k")
    room.during_the_run(lambda: _fill(disk))
    return _to(room, "-o", "disk/out")


@case(
    "a disk with no room for the last small files",
    1,
    "disk/out.partial: the disk is full (",
    "run the same command again",
)
def disk_fills_up_at_the_end(room: Room) -> Arguments:
    arguments = _to(room, "-o", "disk/out", "--shard-size", "10kB")
    mount(room, "60k")
    (room.path / "a" / "tokenizer.json").write_text('{"a": "' + "x" * 40_000 + '"}')
    return arguments


@case("a disk that holds no files of that size", 1, "out.partial: cannot write: File too large", "smaller --shard-size")
def file_too_large(room: Room) -> Arguments:
    arguments = _to(room, "-o", "out")
    room.run_before(["run", "r.yaml", "-o", "warm", "--quiet"])  # compiled kernels are files too
    limit("RLIMIT_FSIZE", 6000, room)
    return arguments


@case("an output that exists", 2, "out exists; nothing was changed. Choose another --out, or --force to replace it")
def output_exists(room: Room) -> Arguments:
    (room.path / "out").mkdir()
    (room.path / "out" / "thesis.txt").write_text("precious")
    return _to(room, "-o", "out")


@case("an output that is a file", 2, "out exists and is not a directory", "Choose another --out")
def output_is_a_file(room: Room) -> Arguments:
    (room.path / "out").write_text("precious")
    return _to(room, "-o", "out")


@case("an output that is a file, with --force", 2, "out exists and is not a directory", "Choose another --out")
def output_is_a_file_forced(room: Room) -> Arguments:
    (room.path / "out").write_text("precious")
    return _to(room, "-o", "out", "--force")


@case("an output that is a link", 2, "out exists and is not a directory", "Choose another --out")
def output_is_a_link(room: Room) -> Arguments:
    (room.path / "elsewhere").mkdir()
    (room.path / "out").symlink_to("elsewhere")
    return _to(room, "-o", "out", "--force")


@case(
    "--force over a directory that holds an input",
    2,
    "models holds models/a, which this run reads",
    "Choose another --out",
)
def force_over_inputs(room: Room) -> Arguments:
    room.model("models/a", seed=1)
    room.model("models/b", seed=2, like=1)
    room.recipe(LINEAR.replace("model: a", "model: models/a").replace("model: b", "model: models/b"))
    return ["run", "r.yaml", "-o", "models", "--force"]


@case("--force over an input", 2, "b holds b, which this run reads", "Choose another --out")
def force_over_an_input(room: Room) -> Arguments:
    return _to(room, "-o", "b", "--force")


@case("an output that is the working directory", 2, "exists; nothing was changed")
def output_is_here(room: Room) -> Arguments:
    return _to(room, "-o", ".")


@case("an output that is the root directory", 2, "--out /: ", "expected the name of a directory to make")
def output_is_root(room: Room) -> Arguments:
    return _to(room, "-o", "/", "--force")


@case("an output without a name", 2, "exists; nothing was changed")
def output_without_name(room: Room) -> Arguments:
    return _to(room, "-o", "")


@case("an output name of 300 letters", 1, "File name too long")
def endless_output_name(room: Room) -> Arguments:
    return _to(room, "-o", "x" * 300)


@case(
    "unfinished work of another recipe",
    2,
    "out.partial holds unfinished work of another recipe",
    "use --force to start over",
    stops_early=True,
)
def work_of_another_recipe(room: Room) -> Arguments:
    unfinished(room)
    (room.path / "r.yaml").write_text(LINEAR.replace("0.5", "0.6", 1))
    return ["run", "r.yaml", "-o", "out"]


@case("unfinished work of another recipe, with --force", 0, "21 tensors")
def work_of_another_recipe_forced(room: Room) -> Arguments:
    unfinished(room, "--shard-size", "1kB")
    room.watch = False
    return ["run", "r.yaml", "-o", "out", "--force"]


@case(
    "somebody's own directory called OUT.partial",
    2,
    "out.partial exists and is not unfinished work of merge run",
    "choose another --out",
)
def partial_is_somebody_s(room: Room) -> Arguments:
    (room.path / "out.partial").mkdir()
    (room.path / "out.partial" / "thesis.txt").write_text("precious")
    return _to(room, "-o", "out")


@case("a file called OUT.partial", 1, "out.partial", "File exists", "Choose another --out")
def partial_is_a_file(room: Room) -> Arguments:
    (room.path / "out.partial").write_text("precious")
    return _to(room, "-o", "out")


@case(
    "a second run into one directory",
    1,
    "out.partial is being written by another run. Wait for it, or choose another --out",
)
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


@case(
    "a source that is written again during the run",
    1,
    "b/model.safetensors: was written again since the run was planned",
    "run again",
)
def source_written_again(room: Room) -> Arguments:
    weights = room.path / "b" / "model.safetensors"
    room.during_the_run(lambda: os.utime(weights, (1, 1)))
    return _to(room, "-o", "out")


@case(
    "a source that is cut short during the run",
    1,
    "b/model.safetensors: changed since the run was planned: expected",
    "bytes, found 500",
)
def source_cut_short(room: Room) -> Arguments:
    weights = room.path / "b" / "model.safetensors"
    room.during_the_run(lambda: os.truncate(weights, 500))
    return _to(room, "-o", "out")


@case(
    "a source that is deleted during the run", 1, "b/model.safetensors: was there when the run was planned and is gone"
)
def source_deleted(room: Room) -> Arguments:
    room.during_the_run(lambda: (room.path / "b" / "model.safetensors").unlink())
    return _to(room, "-o", "out")


@case("a tokenizer that is deleted after the plan", 1, "a/tokenizer.json: cannot be read (No such file or directory)")
def tokenizer_deleted(room: Room) -> Arguments:
    from merge.engine import run

    read = run.side_file_bytes

    def then(plan: Any) -> dict[str, bytes]:
        (room.path / "a" / "tokenizer.json").unlink()
        return read(plan)

    room.watch = False
    room.patch("merge.engine.run.side_file_bytes", then)
    return _to(room, "-o", "out")


@case(
    "a source that was replaced since the run was killed",
    1,
    "out.partial holds unfinished work with other contents of",
    "b/model.safetensors, which changed since",
    "Put the old file back to finish that work, or use --force to start over",
)
def source_replaced_since_kill(room: Room) -> Arguments:
    _replace_source(room)
    return ["run", "r.yaml", "-o", "out"]


@case("a source that was replaced since the run was killed, with --force", 0, "21 tensors")
def source_replaced_since_kill_forced(room: Room) -> Arguments:
    _replace_source(room)
    room.watch = False
    return ["run", "r.yaml", "-o", "out", "--force"]


@case("a source that was copied since the run was killed", 0, "21 tensors (10 of them taken from an earlier run)")
def source_copied_since_kill(room: Room) -> Arguments:
    unfinished(room, steps=10)
    shutil.copyfile(room.path / "b" / "model.safetensors", room.path / "copy")
    os.replace(room.path / "copy", room.path / "b" / "model.safetensors")
    room.watch = False
    return ["run", "r.yaml", "-o", "out"]


@case(
    "a source that is replaced during the run, with its size and mtime",
    1,
    "b/model.safetensors: was replaced or written to since the run was planned",
)
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


@case("--max-ram 1MiB", 2, "--max-ram 1MiB is too little: this merge needs", "MiB with one thread")
def too_little_memory(room: Room) -> Arguments:
    return _to(room, "--max-ram", "1MiB")


@case("--max-ram lots", 2, "--max-ram", '"lots" is not a size; write for example 5GB or 512MiB')
def memory_of_nonsense(room: Room) -> Arguments:
    return _to(room, "--max-ram", "lots")


@case("--max-ram of 400 digits", 2, "--max-ram", "is not a size")
def memory_of_many_digits(room: Room) -> Arguments:
    return _to(room, "--max-ram", "9" * 400)


@case("--shard-size 0", 2, "--shard-size", '"0" is not a size')
def shard_size_zero(room: Room) -> Arguments:
    return _to(room, "--shard-size", "0")


@case("--shard-size 5GX", 2, "--shard-size", '"5GX" is not a size; write for example 5GB or 512MiB')
def shard_size_nonsense(room: Room) -> Arguments:
    return _to(room, "--shard-size", "5GX")


@case("--threads 0", 2, "--threads", "0 is not in the range 1<=x<=1024")
def no_threads(room: Room) -> Arguments:
    return _to(room, "--threads", "0")


@case("--threads 1000000", 2, "--threads", "1000000 is not in the range 1<=x<=1024")
def million_threads(room: Room) -> Arguments:
    return _to(room, "--threads", "1000000")


@case("--device cuda without a GPU", 2, "--device cuda: torch finds no GPU here", "Use --device cpu")
def no_gpu(room: Room) -> Arguments:
    room.patch("torch.cuda.is_available", lambda: False)
    return _to(room, "--device", "cuda")


@case("--device cuda:9 with one GPU", 2, "--device cuda:9: torch finds 1 here, numbered from cuda:0")
def no_such_gpu(room: Room) -> Arguments:
    room.patch("torch.cuda.is_available", lambda: True)
    room.patch("torch.cuda.device_count", lambda: 1)
    return _to(room, "--device", "cuda:9")


@case("--device foo", 2, '--device "foo": expected cpu, cuda or cuda:N')
def unknown_device(room: Room) -> Arguments:
    return _to(room, "--device", "foo")


@case("an unknown verb", 2, 'no such command "rnu"; did you mean "run"?')
def unknown_verb(room: Room) -> Arguments:
    return ["rnu", "r.yaml"]


@case("an unknown option", 2, "--thread", "Did you mean '--threads'?")
def unknown_option(room: Room) -> Arguments:
    return _to(room, "--thread", "2")


@case("merge run without a recipe", 2, "Missing argument 'RECIPE'")
def no_recipe(room: Room) -> Arguments:
    return ["run"]


@case("an unknown method to explain", 2, 'unknown method "tise"; did you mean "ties"?')
def method_to_explain(room: Room) -> Arguments:
    return ["methods", "tise"]


@case("memory that runs out", 1, "out of memory", "--max-ram", "--threads")
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
    from merge.engine import run

    step, lock, done = run._run_step, threading.Lock(), []

    def stop(*arguments: Any) -> None:
        with lock:  # tensors that other threads have begun are not finished either
            if len(done) == steps:
                raise KeyboardInterrupt
            step(*arguments)
            done.append(True)

    arguments = _to(room, "-o", "out", *options)
    with mock.patch("merge.engine.run._run_step", stop):
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
