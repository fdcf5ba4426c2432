"""Checks whether the Hugging Face hub answers: once a process, before anything is downloaded.

Without an answer the process goes offline, so that no library retries for minutes: huggingface_hub, datasets and
transformers then read their caches, or fail at once.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time

from merge.errors import first_line

# The user gets the message within ten seconds; the rest of them is for imports.
ANSWER_SECONDS = 6.0
OFFLINE = "HF_HUB_OFFLINE is set, so nothing is downloaded"  # by the user
_went_offline: list[str] = []  # why this process did


def no_network() -> str | None:
    """Why nothing can be downloaded; None if the hub answered. Takes at most ANSWER_SECONDS, once a process."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        said = _question().answer()
        if said is None:
            return None
        _went_offline.append(said)
        _go_offline()
    return _went_offline[0] if _went_offline else OFFLINE


def ask_early() -> None:
    """Sends the request early, while other work goes on; no request if the user is offline."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _question()


class _Question:
    """One request, sent on construction, in a thread: looking up a host name has no time limit."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._said: list[str | None] = []
        self._until = time.monotonic() + ANSWER_SECONDS
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        import huggingface_hub

        try:
            session = huggingface_hub.get_session()
            session.head(self._endpoint, timeout=ANSWER_SECONDS)  # any answer shows that there is a server
            session.timeout = ANSWER_SECONDS  # by default later requests may hang
            self._said.append(None)
        except Exception as error:  # the HTTP library differs between versions of huggingface_hub, and so do its errors
            self._said.append(f"{self._endpoint} cannot be reached: {first_line(error)}")

    def answer(self) -> str | None:
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._said[0] if self._said else f"{self._endpoint} gave no answer within {ANSWER_SECONDS:.0f} s"


@functools.cache
def _question() -> _Question:
    from huggingface_hub import constants

    return _Question(constants.ENDPOINT)


def _go_offline() -> None:
    """Switches libraries offline for the rest of the process, whether already loaded or not."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    os.environ.update(dict.fromkeys(names, "1"))
    constants.HF_HUB_OFFLINE = True
    for library in ("datasets", "evaluate"):
        if config := sys.modules.get(f"{library}.config"):
            for name in names:
                if hasattr(config, name):
                    setattr(config, name, True)
