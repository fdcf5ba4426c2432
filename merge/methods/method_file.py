"""Methods that are not part of this package: from installed packages, and from a file.

A package names modules in the entry-point group `merge.methods`; they are imported when methods are first asked for.
A file is given by `--method-file`, or to load_method_file. Either registers methods with the decorator of
merge/methods/registry.py, and each method's `origin` says where it came from, so that the plan, and with it resume and
the manifest, tell one version from another.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path

from merge.errors import MergeError, UsageError
from merge.methods import registry
from merge.methods.entry_points import failure


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
