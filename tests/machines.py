"""The suite as other machines would run it: python tests/machines.py [PROFILE ...] [-- PYTEST ARGUMENTS]

Libraries choose their code by the processor: vector width, fused multiply-add, the order of sums. Environment variables
let one machine take the code paths of others, each with a language, time zone, terminal and temporary directory of its
own. `make test-machines` runs all profiles that this processor can; every one of them must be green.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HASWELL = "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+sse4.2,+popcnt,+lzcnt"
NUMPY_512 = ("X86_V4", "AVX512_ICL", "AVX512_SPR")  # numpy's names of groups of features
# By profile: what /proc/cpuinfo must have, what numpy is to do without, and the environment.
PROFILES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    # A laptop: AVX2, one core.
    "laptop": (
        "avx2",
        NUMPY_512,
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
            "MKL_CBWR": "AVX2",
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": HASWELL,
            "TEST_THREADS": "1",
            "TZ": "Pacific/Kiritimati",
        },
    ),
    # AMD, where MKL takes its common path.
    "amd": (
        "avx2",
        NUMPY_512,
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "OPENBLAS_CORETYPE": "Zen",
            "MKL_CBWR": "COMPATIBLE",
            "TEST_THREADS": "2",
            "COLUMNS": "60",
        },
    ),
    # Before AVX2 and FMA; in the C locale.
    "old": (
        "sse4_2",
        ("X86_V3", *NUMPY_512),
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "OPENBLAS_CORETYPE": "Nehalem",
            "MKL_CBWR": "COMPATIBLE",
            "NUMBA_CPU_NAME": "generic",
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-AVX512F",
            "TEST_THREADS": "1",
            "LC_ALL": "C",
            "TZ": "America/St_Johns",
        },
    ),
    # A server: AVX-512, without the matrix units that newer ones have.
    "server": (
        "avx512f",
        (),
        {
            "ATEN_CPU_CAPABILITY": "avx512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "OPENBLAS_CORETYPE": "SkylakeX",
            "MKL_CBWR": "AVX512",
            "NUMBA_CPU_NAME": "skylake-avx512",
            "TEST_THREADS": "2",
        },
    ),
}


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """(pytest's exit code, its closing line) of the suite under a profile; it prints as it goes"""
    _, without, settings = PROFILES[name]
    with tempfile.TemporaryDirectory(prefix=f"machine {name} ") as place:  # compiled kernels are the processor's own
        own = settings | {"NUMBA_CACHE_DIR": f"{place}/numba", "TMPDIR": place, **_disabled(without)}
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider"]
        print(f"--- {name}: {' '.join(f'{key}={value}' for key, value in own.items())}", flush=True)
        with subprocess.Popen([*command, *arguments], env=os.environ | own, stdout=subprocess.PIPE, text=True) as tests:
            last = ""
            for line in tests.stdout or ():
                print(line, end="", flush=True)
                last = line.strip(" =\n") or last
    return tests.returncode, last


def _disabled(features: tuple[str, ...]) -> dict[str, str]:
    """Of numpy's features those that this processor has: for others it would warn."""
    from numpy._core._multiarray_umath import __cpu_features__ as found

    here = [feature for feature in features if found.get(feature)]
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(here)} if here else {}


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="ascii", errors="replace").split() if cpuinfo.exists() else []
    failed, lines = False, []
    for name in words[:cut] or PROFILES:
        if flags and PROFILES[name][0] not in flags:
            lines.append(f"{name}: not here, the processor has no {PROFILES[name][0]}")
            continue
        began = time.monotonic()
        code, last = run(name, words[cut + 1 :])
        failed |= code != 0
        lines.append(f"{name}: {last} ({time.monotonic() - began:.0f} s)")
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    main()
