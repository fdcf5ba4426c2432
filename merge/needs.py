"""Checks that the packages of an extra are installed, before any work and without importing them."""

from __future__ import annotations

import importlib.util

from merge.errors import UsageError

# What transformers reads weights of a quantisation with, by quant_method.
QUANTISED = {
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("accelerate", "compressed_tensors"),
    "fp8": ("accelerate",),
}


def need(what: str, extra: str, *packages: str, otherwise: str = "") -> None:
    """Raises UsageError, with the command that installs them, if one of the packages is not installed.

    Args:
        what: what needs them, the beginning of the message.
        extra: of this project, or another package's name that pip installs.
        packages: names as they are imported.
        otherwise: what can be done without them, a sentence.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        install = f"'merge-workbench[{extra}]'" if extra in _EXTRAS else f"'{extra}'"
        names = " and ".join(missing)
        raise UsageError(f"{what} needs {names}: pip install {install}.{otherwise and f' {otherwise}'}")


_EXTRAS = ("finetune", "quantize", "eval", "search", "tensorboard", "distributed", "gguf")
