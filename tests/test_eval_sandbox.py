"""Code that models write: right answers pass, escapes do not, and nobody but the judge says which is which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.sandbox import LAYERS, described, guard, returned
from eval.sandbox.inside.values import encode, same
from eval.sandbox.places import places
from eval.sandbox.process import _holds_too_much, run
from eval.sandbox.removal import remove_tree
from eval.tasks.core.code import check, problems
from merge.errors import MergeError

resource = pytest.importorskip("resource")
HERE = Path(__file__).parent
ESCAPES = (HERE / "escapes.py").read_text(encoding="utf-8")
ORDINARY = (HERE / "ordinary_programs.py").read_text(encoding="utf-8")

LAST = ("rlimits", "audit hooks")  # what is left where the kernel offers nothing
NO_FILES = ("seccomp", *LAST)  # nothing says which files may be written, so none may
# Every guard that this machine can have, by what it is allowed.
ALLOWED = [LAYERS, LAYERS[1:], LAYERS[2:], ("bubblewrap", *LAST), ("landlock", *LAST), NO_FILES, LAST]
GUARDS = list({guard(allowed): allowed for allowed in ALLOWED}.values())
# Those in which the kernel alone has to do, as if the program had already got around the audit hooks.
KERNEL = {guard(allowed): allowed for allowed in (LAYERS[:-1], LAYERS[1:-1], LAYERS[2:-1])}
FILES = [allowed for layers, allowed in KERNEL.items() if {"bubblewrap", "landlock"} & set(layers)]
CALLS = [allowed for layers, allowed in KERNEL.items() if "seccomp" in layers]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def named(allowed: tuple[str, ...]) -> str:
    return "+".join(guard(allowed)).replace(" ", "-")


def value(source: str, *arguments: Any, function: str = "f", allowed: tuple[str, ...] = LAYERS, **limits: Any) -> Any:
    """What a function of the program returned, encoded; "nothing" if it did not return."""
    found = returned(source, function, [arguments], allowed=allowed, **limits)
    return found[0] if found else "nothing"


# Right answers

LEFT_OUT = ("antigravity", "this", "idlelib", "turtledemo")  # open a browser, print, need a screen
PARTS = "asyncio.subprocess concurrent.futures.process email.mime.text html.parser http.client http.cookies http.server"
PARTS += " importlib.metadata logging.handlers multiprocessing.pool unittest.mock urllib.parse urllib.request"
PARTS += " wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax xmlrpc.client ctypes.util encodings.idna"
MODULES = sorted(name for name in sys.stdlib_module_names if name not in LEFT_OUT) + PARTS.split()
IMPORTS = """
def f(names):
    refused = {}
    for name in names:
        try:
            __import__(name)
        except BaseException as error:
            refused[name] = type(error).__name__
    return refused
"""


@pytest.fixture(scope="module")
def missing() -> dict[str, str]:
    """Modules of the standard library that this Python lacks anywhere."""
    program = f"import json, sys\n{IMPORTS}\nfound = f({MODULES!r})\nprint(json.dumps(found), file=sys.stderr)"
    done = subprocess.run([places().executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stderr.splitlines()[-1])
    return found


# The most there is and the least: what lies between refuses no more than the one or the other.
@pytest.mark.parametrize("allowed", [GUARDS[0], LAST], ids=named)
def test_the_standard_library_can_be_imported(allowed: tuple[str, ...], missing: dict[str, str]) -> None:
    assert "pathlib" in MODULES
    assert "pathlib" not in missing
    assert value(IMPORTS, MODULES, allowed=allowed, timeout=60) == encode(missing)


@pytest.mark.parametrize("allowed", GUARDS, ids=named)
def test_ordinary_code_runs(allowed: tuple[str, ...]) -> None:
    plain = [None, True, b"x", 10**40, 0.1, "\udc80"]
    expected = {
        "coroutines": 3,
        "threads": 44850,
        "database": [(1,)],
        "digest": "e3b0c442",
        "kind_of_file": "text/html",
        "environment": "b",
        "output": 1,
        "recursion": 9000,
        "values": [*plain, {"a": 2, "b": 1}, {1, 2}, {"q"}, 2, {(1, 2): "é"}, ()],
    }
    if guard(allowed) != NO_FILES:
        expected |= {"files": ("x", ["b"]), "renaming": ["b"]}
    found = value(ORDINARY, list(expected), function="call", allowed=allowed)
    assert same(encode(expected), found), found


def test_equality_is_python_s() -> None:
    assert same(encode(6), encode(6.0))
    assert same(encode(0.3), encode(0.1 + 0.2))
    assert not same(encode([1, 2]), encode((1, 2)))
    assert not same(encode(True), encode(1))
    assert not same(encode(None), encode(0))
    assert not same(encode({1: "a"}), encode({"1": "a"}))
    assert not same(encode("["), encode([]))
    assert not same(encode(0.5), 10**400)
    with pytest.raises(TypeError):
        encode(object())


# Escapes


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    import escapes

    for name in (*escapes.names("file"), *escapes.names("rawfile")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_text("stays", encoding="utf-8")
        os.utime(tmp_path / name / "own", (86400, 86400))
    return tmp_path


def state(outside: Path) -> Any:
    found = []
    for place in sorted(outside.iterdir()):
        own = place / "own"
        status, text = own.stat(), own.read_text(encoding="utf-8")
        attributes = os.listxattr(own) if sys.platform == "linux" else []
        found.append((os.listdir(place), text, status.st_mode, status.st_mtime, attributes))
    return found


def escaped(kind: str, *places: Path, allowed: tuple[str, ...]) -> Any:
    return value(ESCAPES, kind, *map(str, places), function="attempt", allowed=allowed)


@LINUX
def test_without_a_guard_the_escapes_succeed(outside: Path) -> None:
    import escapes

    for kind in ("file", "rawfile"):
        assert escaped(kind, outside, allowed=()) == encode(escapes.names(kind))
    for kind in ("process", "rawprocess"):
        assert escaped(kind, allowed=()) == encode(escapes.names(kind))


@pytest.mark.parametrize("allowed", GUARDS, ids=named)
def test_files_elsewhere_are_out_of_reach(allowed: tuple[str, ...], outside: Path) -> None:
    before = state(outside)
    assert escaped("file", outside, allowed=allowed) == ["list"]
    assert state(outside) == before


@pytest.mark.parametrize("allowed", FILES, ids=named)
def test_the_kernel_alone_keeps_files_out_of_reach(allowed: tuple[str, ...], outside: Path) -> None:
    before = state(outside)
    assert escaped("file", outside, allowed=allowed) == ["list"]
    assert escaped("rawfile", outside, allowed=allowed) == ["list"]
    assert state(outside) == before


@pytest.mark.parametrize("allowed", GUARDS, ids=named)
def test_processes_and_the_network_are_out_of_reach(allowed: tuple[str, ...]) -> None:
    assert escaped("process", allowed=allowed) == ["list"]


@pytest.mark.parametrize("allowed", CALLS, ids=named)
def test_the_kernel_alone_keeps_processes_out_of_reach(allowed: tuple[str, ...]) -> None:
    assert escaped("process", allowed=allowed) == ["list"]
    assert escaped("rawprocess", allowed=allowed) == ["list"]


@pytest.mark.parametrize("allowed", GUARDS, ids=named)
def test_solutions_cannot_be_read(allowed: tuple[str, ...]) -> None:
    import eval.tasks.core

    file = Path(eval.tasks.core.__file__).parent / "data" / "functions.jsonl"
    assert file.exists()
    assert value("def f(path): return open(path).read()", str(file), allowed=allowed) == "nothing"


# Limits


def test_what_does_not_end_is_ended() -> None:
    began = time.monotonic()
    assert value("def f():\n  while True: pass", timeout=0.5) == "nothing"
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef f(): time.sleep(60)"
    assert value(deaf, timeout=0.5) == "nothing"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("allowed", [GUARDS[0], LAST], ids=named)
def test_memory_and_files_are_bounded(allowed: tuple[str, ...]) -> None:
    assert value("def f(): return len(bytearray(1 << 31))", allowed=allowed) == "nothing"
    assert value("def f(): open('x', 'w').write('x' * (1 << 22))", allowed=allowed) == "nothing"
    assert value("def f(): return len([open('x', 'w') for _ in range(100)])", allowed=allowed) == "nothing"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_threads_and_written_bytes_are_bounded() -> None:
    threads = """
import threading, time
threading.stack_size(1 << 16)
def f():
    while True:
        threading.Thread(target=time.sleep, args=(9,)).start()
"""
    written = "def f():\n  while True:\n    with open('own', 'w') as file: file.write('x' * (1 << 19))"
    began = time.monotonic()
    assert value(threads, timeout=60) == "nothing"
    assert value(written, timeout=60) == "nothing"
    assert time.monotonic() - began < 40


def test_a_flooded_channel_costs_this_process_nothing() -> None:
    flood = """
import os
def f(chunk):
    for number in range(3, 20):
        try:
            while True:
                os.write(number, chunk)
        except OSError:
            pass
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for chunk in (b"x" * 65536, b"[", b"[" * 9999 + b"\n", b"9" * 99999 + b"\n"):
        assert value(flood, chunk, timeout=5) == "nothing"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux, bytes on macOS
    assert grown < (32 << 20) / (1 if sys.platform == "darwin" else 1024)


def test_many_files_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.sandbox.process._MOST_FILES", 20)
    for n in range(5):
        (tmp_path / f"{n}" / "inner").mkdir(parents=True)
        (tmp_path / f"{n}" / "own").touch()
    assert not _holds_too_much(str(tmp_path))  # 15
    for n in range(6):
        (tmp_path / "3" / "inner" / f"{n}").touch()
    assert _holds_too_much(str(tmp_path))
    assert not _holds_too_much(str(tmp_path / "gone"))


MESS = """
import os
def f(depth):
    for name in (b"\\xff\\xfe", b"\\n", b"-rf", b" "):
        open(name, "w").close()
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    open("own", "w").close()
    return 1
"""


@pytest.mark.parametrize("allowed", GUARDS, ids=named)
def test_nothing_is_left(allowed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Deeper than Python's stack in one of them; that takes seconds on some disks.
    depth = 1100 if guard(allowed) == LAST else 9
    assert value(MESS, depth, allowed=allowed) == ("nothing" if guard(allowed) == NO_FILES else 1)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_of_any_kind_is_removed(tmp_path: Path) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir()
    (outside / "own").write_text("stays", encoding="utf-8")
    outside.chmod(0o500)
    deepest = top / "closed" / "a" / "b"
    deepest.mkdir(parents=True)
    for place in (top, deepest):
        (place / "link").symlink_to(outside)
        (place / "own").symlink_to(outside / "own")
        os.mkfifo(place / "fifo")
        for n in range(30):
            (place / f"directory-{n}").mkdir()
    for n in range(1100):  # more than are looked at together
        (top / f"file-{n}").touch()
    for place in (deepest, *deepest.parents[:2]):
        place.chmod(0)
    remove_tree(str(top))
    assert not top.exists()
    assert (outside / "own").read_text(encoding="utf-8") == "stays"
    assert outside.stat().st_mode & 0o777 == 0o500


# The verdict

(ADD,) = [problem for problem in problems() if problem["name"] == "add_three"]
WRITES = r"""
    import os
    for number in range(3, 20):
        try:
            os.write(number, b"true\n6\n" * 9)
        except OSError:
            pass
    os._exit(0)
"""
FORGED = {
    "leaves": "\n    import os; os._exit(0)\n",
    "exits": "\n    raise SystemExit(0)\n",
    "equals": "\n    return type('All', (int,), {'__eq__': lambda a, b: True, '__hash__': int.__hash__})(9)\n",
    "patches": "\n    import json; json.dumps = lambda *a, **k: 'true'; return 0\n",
    "writes": WRITES,
}


@pytest.mark.parametrize("body", FORGED.values(), ids=FORGED)
def test_a_verdict_cannot_be_forged(body: str) -> None:
    assert check(ADD, [body]) == {"pass@1": 0.0}


def test_what_is_expected_is_nowhere_in_the_process() -> None:
    """Neither in a frame nor in an object; so the program could only guess it."""
    search = """
    import gc, sys
    sought = 'gnissorc-arbez'  # backwards, so that it does not find itself
    held = [value for value in gc.get_objects() if isinstance(value, (list, tuple, dict))]
    frame = sys._getframe()
    while frame:
        held += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    if any(sought in repr(value)[::-1] for value in held):
        return sought[::-1]
"""
    problem = {"name": "f", "prompt": 'def f():\n    """Search."""', "tests": 'assert f() == "zebra-crossing"\n'}
    told = problem | {"prompt": problem["prompt"] + "\n    told = ['zebra-crossing']"}
    assert check(told, [search]) == {"pass@1": 1.0}
    assert check(problem, [search]) == {"pass@1": 0.0}


# What is said of it


def test_a_guard_without_the_kernel_says_so() -> None:
    assert described(("bubblewrap", "rlimits")) == "the code that models wrote was run under bubblewrap, rlimits"
    assert described(LAST).endswith("rlimits, audit hooks only: a guard against mistakes, not against attacks")
    assert "without a guard" in described(())


@pytest.fixture
def broken_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("broken_bubblewrap")
def test_a_bubblewrap_that_does_not_work_is_not_used() -> None:
    assert guard.__wrapped__(("bubblewrap", *LAST)) == LAST


@pytest.mark.usefixtures("broken_bubblewrap")
def test_a_guard_that_fails_later_is_an_error_and_no_wrong_answer() -> None:
    with pytest.raises(MergeError, match=r"a process under bubblewrap, rlimits did not start"):
        run(("bubblewrap", "rlimits"), "def f(): return 1", "f", [()], 10.0, 1 << 30)
