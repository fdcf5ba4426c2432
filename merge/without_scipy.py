"""numba's registries without scipy, which they import to see whether it has a BLAS: a quarter of a run's start-up.

No kernel calls a BLAS, so nothing that numba compiles here needs one. Whoever imports scipy later gets it.
"""

from __future__ import annotations

import sys

_BLAS = "scipy.linalg.cython_blas"

if _BLAS not in sys.modules:
    sys.modules[_BLAS] = None  # type: ignore[assignment]  # importing it then fails, as where there is no scipy
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del sys.modules[_BLAS]
