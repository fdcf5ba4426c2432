"""merge generate without a prompt, as it is typed: in a terminal of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_llama import make_tiny_llama

SECONDS = 300.0  # a machine that does ten other things at once


class Terminal:
    """A command in a pseudo terminal."""

    def __init__(self, *words: str | Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "merge", "generate", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env=os.environ | {"TERM": "dumb", "PYTHONUTF8": "1"},
        )
        os.close(slave)
        self._unread = ""

    def until(self, end: str) -> str:
        """What appears up to `end`."""
        deadline = time.monotonic() + SECONDS
        while end not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {end!r} in {self._unread!r}"
            try:
                piece = os.read(self._master, 4096).decode()
            except OSError:  # the process has ended
                piece = ""
            assert piece, f"no {end!r} before the end, but {self._unread!r}"
            self._unread += piece.replace("\r\n", "\n")
        found, _, self._unread = self._unread.partition(end)
        return found

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self._master, 4096):
                pass
        code = self.process.wait(SECONDS)
        os.close(self._master)
        return code


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str | Path) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()


def test_a_conversation_goes_on_and_ends(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", context=64)
    # A template that shows in its own refusals what it was given: that is how the test sees the history.
    (model / "chat_template.jinja").write_text(
        "{% if messages[-1]['content'] == 'tell' %}"
        "{{ raise_exception('said: ' + (messages | map(attribute='role') | join(','))) }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    talk = terminal(model, "--max-tokens", "5", "--system", "s")
    assert "Ctrl-C stops an answer, Ctrl-D ends; /new starts over." in talk.until("> ")
    talk.type("\n")  # nothing said, nothing answered
    assert talk.until("> ") == "\n"
    talk.type("tell\n")
    assert "said: system,user" in talk.until("> ")
    talk.type("abc\n")
    assert len(talk.until("> ").strip()) > len("abc")
    talk.type("tell\n")
    assert "said: system,user,assistant,user" in talk.until("> ")  # the refused turn was forgotten
    talk.type("half a li")
    talk.until("half a li")
    time.sleep(0.5)  # readline takes notice of a signal while it waits for the next key, which begins after the echo
    talk.type("\x03")  # Ctrl-C: the line anew
    talk.until("> ")
    talk.type("a" * 62 + "\n")
    assert "has 64 positions" in (said := talk.until("> "))
    assert "/new starts over" in said
    talk.type("/new\n")
    talk.until("> ")
    talk.type("tell\n")
    assert "said: system,user)" in talk.until("> ")
    talk.type("\x04")
    assert talk.close() == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", context=1 << 20, chat=False)
    for file in ("config.json", "generation_config.json"):  # never ends by itself
        text = (model / file).read_text(encoding="utf-8")
        (model / file).write_text(text.replace('"eos_token_id": 1', '"eos_token_id": null'), encoding="utf-8")
    talk = terminal(model, "--max-tokens", "1000000")
    assert "each line is continued on its own" in talk.until("> ")
    talk.type("abc\n")
    talk.until("abc\n")
    time.sleep(1)  # in the middle of a million tokens
    talk.type("\x03")
    talk.until("\n> ")
    talk.type("\x04")
    assert talk.close() == 0


def test_a_template_that_is_not_there_is_said_before_anything_is_typed(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    talk = terminal(make_tiny_llama(tmp_path / "model", chat=False), "--chat")
    assert "> " not in talk.until("its tokenizer has no chat template")
    assert talk.close() == 2
