"""Methods that are not part of this package: from installed packages, and from a file.

A package names modules in the entry-point group `merge.methods`; they are imported when methods are first asked for.
A file is given by `--method-file`, or to load_method_file. Either registers methods with the decorator of
merge/methods/registry.py, and each method's `origin` says where it came from, so that the plan, and with it resume and
the manifest, tell one version from another.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
import types
from importlib import metadata
from pathlib import Path

from merge.errors import MergeError, UsageError
from merge.methods import registry

GROUP = "merge.methods"


def load_method_file(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Runs a Python file that registers merge methods; the same file again replaces its methods.

    Returns:
        The names of its methods.

    Raises:
        UsageError: the file is missing or fails, registers nothing, or a name is taken.
    """
    registry.all_methods()  # so that a name that is taken is known to be
    place = Path(path)
    try:
        source = place.read_bytes()
    except OSError as error:
        raise UsageError(f"--method-file {place}: {error.strerror or error}.") from None
    module = types.ModuleType(f"{place.stem}_{hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:8]}")
    module.__file__ = str(place)
    registry.forget(module.__name__)
    try:
        with registry.registering(f"{place.name}, sha256 {hashlib.sha256(source).hexdigest()}") as names:
            # Not by importlib, which may run an older __pycache__: what runs must be what the digest is of.
            code = compile(source, str(place), "exec", dont_inherit=True)
            sys.modules[module.__name__] = module
            exec(code, module.__dict__)
    except MergeError as error:
        raise UsageError(f"--method-file {place}: {error}") from None
    except SyntaxError as error:
        where = f"{place}:{error.lineno}" if error.lineno else str(place)
        raise UsageError(f"--method-file: {where}: {error.msg}.") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"--method-file: {failure(error, str(place))}.") from error
    if not names:
        raise UsageError(
            f"--method-file {place}: it registers no merge method. Decorate a function with @method(...); "
            "docs/methods.md has an example."
        )
    return tuple(names)


def load_entry_points() -> None:
    """Imports what installed packages offer.

    Raises:
        MergeError: a package fails to import, or a name is taken.
    """
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (_package(point), point.name)):
        package = _package(point)
        try:
            with registry.registering(f"{package} ({point.module}){_module_digest(point.module)}"):
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
