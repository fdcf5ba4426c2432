"""Decides which results have the same bytes on every machine, and records what the others depend on.

Kernels fix the order of every sum and call no library function. Matrix decompositions are those of BLAS and LAPACK,
whose code differs by processor, version and settings: such results agree to rounding.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from merge.adapter_kinds import find_kind
from merge.engine.costs import needs_float64
from merge.methods import get_method
from merge.plan import COPY, Derived, Plan, Step, TensorRef
from merge.planning.factors import is_exact
from merge.sources import FOUND

# Environment variables that make MKL, OpenBLAS, torch and numpy choose other code.
SETTINGS = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
    "ATEN_CPU_CAPABILITY",
    "NPY_DISABLE_CPU_FEATURES",
)
_OTHERS = ("scipy.libs", "scikit_learn.libs")  # folders of BLAS libraries that no method uses


def is_bitwise(plan: Plan, step: Step, device: str) -> bool:
    """Whether a step gives the same bytes on every machine: kernels on CPU do, and all copies.

    Stages that a pipeline wrote earlier are not in the plan; their methods count.
    """
    if not all(map(_is_bitwise_source, step.sources)) or not all(_promises(stage.method) for stage in plan.stages):
        return False
    if step.kind == "copy" or step.size == 0:
        return True
    if step.kind == "factor":
        return is_exact(step)
    return device == "cpu" and not needs_float64(step) and _promises(step.method)


def _promises(name: str) -> bool:
    method = get_method(name)
    return name == COPY or (method is not None and method.reproducible == "bitwise")


def _is_bitwise_source(ref: TensorRef) -> bool:
    if not isinstance(ref, Derived):
        return True
    operation, parameters = ref.operation, ref.parameters
    # a decomposition; what a model gave that was run (orders of units are whole numbers, found exactly)
    if operation == "residual" or (operation == FOUND and not ref.is_exact):
        return False
    if operation == "adapted" and not find_kind(parameters["kind"]).bitwise:
        return False
    if operation == "stage" and not _promises(parameters["method"]):
        return False
    return all(map(_is_bitwise_source, ref.inputs))


def conditions(plan: Plan, device: str) -> dict[str, object] | None:
    """What the bytes depend on, for the manifest; None if they are the same on every machine."""
    if all(is_bitwise(plan, step, device) for step in plan.steps):
        return None
    import torch

    built = torch.__config__.show()
    found = re.search(r"Math Kernel Library Version ([\d.]+)", built)
    libraries: list[dict[str, Any]] = [{"name": "MKL", "version": found[1], "linked_into": "torch"}] if found else []
    return {
        "device": device if device == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}",
        "torch": torch.__version__,
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": libraries + _blas(),
        "threads": 1,  # of each decomposition; see ONE_THREAD
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _blas() -> list[dict[str, object]]:
    """The BLAS libraries that torch and numpy have loaded, without their paths."""
    import threadpoolctl

    libraries = [
        {"name": library["internal_api"], "version": library["version"], "architecture": library.get("architecture")}
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas" and Path(library["filepath"]).parent.name not in _OTHERS
    ]
    return sorted(libraries, key=str)


def _processor() -> str:
    """The processor's model, by which MKL chooses its code."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
