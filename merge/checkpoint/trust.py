"""Decides whether a model directory's own Python code may run: only if the user named that model.

A config.json or tokenizer_config.json with `auto_map` names classes in .py files beside it. transformers would ask on
the terminal whether to run them; here the answer is given beforehand, by `--trust-remote-code MODEL`. A model whose
architecture transformers has itself loads by transformers' own class, and its code stays unread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from merge.checkpoint.side_files import auto_map
from merge.errors import CheckpointError, MergeError
from merge.quoting import excerpt

FLAG = "--trust-remote-code"
_FILES = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class _Policy:
    """`called`: directory -> what the user calls the model in it; `ran`: model -> {file: SHA-256} of code that was run;
    `noted`: files with a note already given."""

    names: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    called: dict[str, str] = field(default_factory=dict)
    ran: dict[str, dict[str, str]] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)


_nobody = _Policy()
_policy: ContextVar[_Policy] = ContextVar("trust")


def _current() -> _Policy:
    return _policy.get(_nobody)


@contextlib.contextmanager
def trusting(*names: str, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """A context in which code of the models with these names may run.

    Args:
        names: directories or hub ids, as the models are named where they are used.
        say: called with a note on code that was not needed.
    """
    token = _policy.set(_Policy(names, say))
    try:
        yield
    finally:
        _policy.reset(token)


def trusted_names() -> tuple[str, ...]:
    return _current().names


def code_that_ran() -> dict[str, dict[str, str]]:
    """Model -> {file: SHA-256} of the code that was run since trusting() began, for records; {} if none was."""
    return dict(_current().ran)


def remember_name(path: str, name: str) -> None:
    """Records that a directory was made from the model `name`: its code may run if that name is trusted."""
    _current().called[os.path.realpath(path)] = name


def known_as(path: str) -> str:
    """The user's name of the model in a directory: a recorded name, a hub id, or the directory itself."""
    if called := _current().called.get(os.path.realpath(path)):
        return called
    repository = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", path)
    return f"{repository[1]}/{repository[2]}" if repository else path


def is_trusted(path: str) -> bool:
    """Whether code of the model in a directory may run.

    A hub id stands for all its snapshots in the cache, `org/name@revision` for that one.
    """
    return any(_stands_for(name, path) for name in trusted_names())


def _stands_for(name: str, path: str) -> bool:
    if os.path.realpath(os.path.expanduser(name)) == os.path.realpath(path):
        return True
    if name == _current().called.get(os.path.realpath(path)):
        return True
    from huggingface_hub import constants

    repository, _, revision = name.partition("@")
    snapshot = Path(path)
    if repository != known_as(path) or not snapshot.is_relative_to(constants.HF_HUB_CACHE):
        return False
    with contextlib.suppress(OSError):
        if revision:
            revision = (snapshot.parents[1] / "refs" / revision).read_text(encoding="utf-8").strip()
    return revision in ("", snapshot.name)


def code_of(path: str) -> dict[str, dict[str, str]]:
    """File -> {class: where its code is} of the classes that configs name by `auto_map`; of a directory, or a file.

    Of a tokenizer's two classes, the one that transformers uses: the fast one, if there is one.
    """
    files = [os.path.join(path, name) for name in _FILES] if os.path.isdir(path) else [path]
    found = {file: auto_map(file) for file in files}
    return {
        file: {key: places[-1] if places else "" for key, places in named.items()}
        for file, named in found.items()
        if named
    }


def permission(path: str) -> bool:
    """The value of trust_remote_code for a directory; code that may run is recorded.

    Raises:
        CheckpointError: the code is that of another repository, which the user did not name.
    """
    if not is_trusted(path):
        return False
    named = code_of(path)
    for file, classes in named.items():
        for where in classes.values():
            repository = where.partition("--")[0] if "--" in where else None
            if repository is not None and repository not in trusted_names():
                raise CheckpointError(
                    f"{file}: auto_map: its code is that of {repository}, which is not named. If you trust it: "
                    f"{FLAG} {repository}"
                )
    if named:
        files = sorted(Path(next(iter(named))).parent.glob("*.py"))
        digests = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
        _current().ran[known_as(path)] = digests
    return True


def refusal(path: str, error: Exception) -> MergeError | None:
    """The error to raise if transformers stopped at code that may not run; None for other errors."""
    # All of transformers' messages about this name the argument; it has no class of error for it.
    if "trust_remote_code" not in str(error):
        return None
    for file, classes in code_of(path).items():
        which = ", ".join(f"{key}: {where}" for key, where in classes.items())
        return CheckpointError(
            f"{file}: auto_map: this model needs Python code of its own ({excerpt(which, 200)}), which is not run. If "
            f"you have read it and trust it: {FLAG} {known_as(path)}"
        )
    return None


def note_unread(path: str) -> None:
    """Notes once that a directory's code was not needed."""
    policy = _current()
    for file in code_of(path):
        if file not in policy.noted:
            policy.noted.add(file)
            policy.say(f"{file}: auto_map names code of its own, which is not run: transformers has this class itself")
