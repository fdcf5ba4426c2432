"""Renders chat templates, which are programs that come with models, within limits of time and memory.

Jinja's sandbox keeps them from files and from the interpreter, but not from loops that never end, and a template of a
line can write gigabytes. So all rendering, transformers' own included, is done by one process beside this one
(worker.py) that may be ended: processor time, memory and the length of what it writes are limited there. It
starts with the first template, in a tenth of a second, and a conversation then takes a fraction of a millisecond more.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

SECONDS = 3.0  # of CPU time for one conversation; usual templates take a millisecond
MEMORY = 512 << 20  # bytes of address space, including Python's own 40 MB
MOST = 16_000_000  # characters of output; the longest contexts have a third of that
_WAIT = 60.0  # seconds: SECONDS on a machine with twenty other processes


class TemplateLimit(TemplateError):
    """A chat template exceeds its time, its memory or the length of its output."""


def bound_templates() -> None:
    """Makes transformers render chat templates here."""
    from transformers.utils import chat_template_utils

    # Private, but the only place where all of transformers' classes with a template compile it.
    if not hasattr(chat_template_utils, "_compile_jinja_template"):
        raise ImportError("this version of transformers renders chat templates elsewhere; install another one")
    chat_template_utils._compile_jinja_template = BoundedTemplate


class BoundedTemplate:
    """The part of a compiled Jinja template that transformers uses."""

    def __init__(self, template: str) -> None:
        self._template = template

    def render(self, **data: Any) -> str:
        """The rendered text. Raises TemplateLimit; TemplateError if the template refuses; ValueError for its errors."""
        return _worker().ask(self._template, data)


def syntax_error(template: str) -> str | None:
    """The syntax error of a Jinja template, with its line; None if it compiles."""
    try:
        _worker().ask(template, None)
    except TemplateError as error:
        return error.message
    return None


def _worker() -> _Worker:
    """The worker of this process; a forked process has its own."""
    return _worker_of(os.getpid())


@functools.cache
def _worker_of(process: int) -> _Worker:
    worker = _Worker()
    atexit.register(lambda: worker.end() if os.getpid() == process else None)
    return worker


class _Worker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._too_much: dict[str, str] = {}  # templates that were ended: each is tried once

    def ask(self, template: str, data: dict[str, Any] | None) -> str:
        """The rendered text; `data` None: only compile."""
        with self._lock:
            if template in self._too_much:
                raise TemplateLimit(self._too_much[template])
            answer = self._exchange(
                {"template": template, "data": data, "seconds": SECONDS, "memory": MEMORY, "most": MOST}
            )
            if isinstance(answer, str):
                self._too_much[template] = answer
                raise TemplateLimit(answer)
        if "text" in answer:
            return str(answer["text"])
        raise (TemplateError if answer.get("is_template", True) else ValueError)(answer["error"])

    def end(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # data that was not sent
                process.stdin.close()

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any] | str:
        """The answer, or the reason if the process ended or had to be killed."""
        process = self._process = self._process or self._started()
        text = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            assert process.stdin is not None
            process.stdin.write(len(text).to_bytes(4, "little") + text)
            process.stdin.flush()
            length = int.from_bytes(self._read(process, 4), "little")
            answer: dict[str, Any] = json.loads(self._read(process, length).decode("utf-8", "surrogatepass"))
            return answer
        except (EOFError, BrokenPipeError):
            code = process.wait()
        except TimeoutError:
            code = -signal.SIGPROF
        except BaseException:  # Ctrl-C: the rest of this answer must not be taken for that of the next question
            self.end()
            raise
        self.end()
        if code == -signal.SIGPROF:
            return f"it takes more than {SECONDS:g} seconds of processor time"
        return f"the process that rendered it ended with exit code {code}"

    def _read(self, process: subprocess.Popen[bytes], count: int) -> bytes:
        assert process.stdout is not None
        found = bytearray()
        while len(found) < count:
            if not select.select([process.stdout], [], [], _WAIT)[0]:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), count - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def _started(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("worker.py")
        # -P: no module of the working directory stands for one of Python's own.
        command = [sys.executable, "-P", "-W", "ignore", str(script)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
