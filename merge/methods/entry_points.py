"""Methods of installed packages: the entry-point group `merge.methods`. See merge/methods/method_file.py."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path

from merge.errors import MergeError

GROUP = "merge.methods"


def load_entry_points(registering: Callable[[str], AbstractContextManager[object]]) -> None:
    """Imports what installed packages offer.

    Args:
        registering: registry.registering, which gives what is registered inside its origin.

    Raises:
        MergeError: a package fails to import, or a name is taken.
    """
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (_package(point), point.name)):
        package = _package(point)
        try:
            with registering(f"{package} ({point.module}){_module_digest(point.module)}"):
                importlib.import_module(point.module)
        except MergeError as error:
            raise MergeError(f"{package}: {error}") from None
        except (Exception, SystemExit) as error:
            raise MergeError(
                f"{package}: its merge methods ({point.value}) cannot be imported: {failure(error)}. "
                "Update or uninstall that package."
            ) from error


def failure(error: BaseException, file: str | None = None) -> str:
    """`my_method.py:7: TypeError: ...`: what a user's code raised, at its last line in `file`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and frame.filename == file]
    where = f"{file}:{lines[-1]}: " if lines else ""
    text = str(error).strip().rstrip(".")
    return f"{where}{type(error).__name__}" + (f": {text}" if text else "")


def _package(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"


def _module_digest(name: str) -> str:
    """Of the module's file: a package under development changes without its version."""
    try:
        spec = importlib.util.find_spec(name)
        return f", sha256 {hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()}" if spec and spec.origin else ""
    except (OSError, ValueError):  # in an archive, or made by hand
        return ""
