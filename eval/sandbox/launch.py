"""The command and environment of the confined process, with bubblewrap around it if available."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from eval.sandbox.places import SandboxPaths, places

_HOME = "/box"  # the temporary directory as it is called within bubblewrap
_HOME_BYTES = 16 << 20
_NOBODY = "65534"
_START = (
    "import sys; sys.path.insert(0, {folder!r}); from inside.runner import main; "
    "del sys.path[0]; sys.dont_write_bytecode = True; main()"
)


def command(layers: Collection[str]) -> list[str]:
    """The command that runs inside/runner.py."""
    at = places()
    folder = Path(__file__).parent
    python = [at.executable, "-I", "-S", "-c", _START.format(folder=str(folder))]
    return [*_bubblewrap(at, folder, "namespaces" in layers), *python] if "bubblewrap" in layers else python


def environment(layers: Collection[str], home: str) -> dict[str, str]:
    """home: the temporary directory, outside of bubblewrap."""
    inside = _HOME if "bubblewrap" in layers else home
    needed = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # by Python on Windows
    # Each arena of the C library takes 64 MiB of addresses, and with a pool of threads soon all there are.
    given = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": inside, "TMPDIR": inside, "MALLOC_ARENA_MAX": "1"}
    return given | needed


def has_bubblewrap() -> bool:
    return shutil.which("bwrap") is not None


def _bubblewrap(at: SandboxPaths, folder: Path, own_proc: bool) -> list[str]:
    """No network, no other processes, and no files but those that the interpreter needs; man 1 bwrap.

    own_proc: namespaces within these are made through /proc; it shows the processes within only.
    """
    mounts: list[str] = []
    for place in at.roots:
        mounts += ["--ro-bind", place, place]
    for place in at.hidden:
        mounts += ["--tmpfs", place, "--remount-ro", place]
    mounts += ["--ro-bind", str(folder), str(folder), "--dev-bind", os.devnull, os.devnull]
    mounts += ["--proc", "/proc"] if own_proc else []
    mounts += ["--size", str(_HOME_BYTES), "--tmpfs", _HOME, "--remount-ro", "/", "--chdir", _HOME]
    bwrap = shutil.which("bwrap") or "bwrap"
    # As nobody: what is root here may not make namespaces within.
    user = ["--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY]
    return [bwrap, "--unshare-all", *user, "--die-with-parent", "--cap-drop", "ALL", *mounts, "--"]
