"""The files that the confined interpreter needs, and those nearby that it must not see.

It needs the standard library, shared libraries, and what these read: time zones, kinds of files. It must not see other
packages, this one least of all: solutions of the problems are in it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.jsontext import parse_json

PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/gnu/store")
_READ = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/etc/mime.types", "/etc/ssl/openssl.cnf",
         "/dev/urandom", "/dev/random", "/dev/zero")  # fmt: skip
_ASK = "import json, site, sys; print(json.dumps([sys.path, site.getsitepackages(), sys.base_prefix]))"


@dataclass(frozen=True)
class SandboxPaths:
    """
    Attributes:
        executable: Python, outside of any virtual environment.
        roots: files and directories that are needed.
        hidden: directories in them that are not.
        readable, listable: the same without hidden ones: what may be read with all that is in it, and the directories
            above hidden ones, whose names may be listed.
        aliases: directories of the standard library as the interpreter calls them, where links lead there.
    """

    executable: str
    roots: tuple[str, ...]
    hidden: tuple[str, ...]
    readable: tuple[str, ...]
    listable: tuple[str, ...]
    aliases: tuple[str, ...]


@functools.cache
def places() -> SandboxPaths:
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    done = subprocess.run([executable, "-I", "-S", "-c", _ASK], capture_output=True, check=True, timeout=60)
    path, packages, prefix = parse_json(done.stdout)
    library = [place for place in path if os.path.exists(place)]
    libraries = [] if sys.platform == "win32" else [place for place in _LIBRARIES if os.path.isdir(place)]
    libraries += [os.path.join(prefix, "DLLs" if sys.platform == "win32" else "lib")]
    roots = [executable, *library, *libraries, *(place for place in _READ if os.path.exists(place))]
    roots = [place for place in roots if not any(_within(place, other) for other in roots if other != place)]
    real = list(dict.fromkeys(os.path.realpath(place) for place in roots))
    # What is found in a root; not a directory above one, as a search path may have.
    others = [place for place in [*packages, *sys.path, str(PACKAGE)] if os.path.isdir(place) and place not in library]
    hidden = tuple(dict.fromkeys(os.path.realpath(place) for place in others))
    hidden = tuple(place for place in hidden if any(_within(place, root) for root in real))
    listable: list[str] = []
    readable = [place for root in real for place in _without(root, hidden, listable)]
    aliases = tuple(place for place in library if os.path.realpath(place) != place)
    return SandboxPaths(executable, tuple(dict.fromkeys(roots)), hidden, tuple(readable), tuple(listable), aliases)


def _within(place: str, directory: str) -> bool:
    return place == directory or place.startswith(directory.rstrip(os.sep) + os.sep)


def _without(place: str, hidden: Sequence[str], listable: list[str]) -> list[str]:
    """`place`, or the parts of it that hold nothing hidden; directories taken apart are added to `listable`."""
    if place in hidden:
        return []
    if not any(_within(each, place) for each in hidden):
        return [place]
    listable.append(place)
    try:
        inside = [os.path.join(place, name) for name in sorted(os.listdir(place))]
    except OSError:  # may not be listed
        return []
    return [part for each in inside for part in _without(each, hidden, listable)]
