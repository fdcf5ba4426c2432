"""residual: a matrix without the part that an adapter took from it when its training began (PiSSA, OLoRA).

inputs: the matrix. parameters: `rank`; `scaling` of the adapter; `method`: "svd" takes the nearest matrix of the rank,
"qr" scaling · Q R of the first `rank` columns of Q; `turned`: stored (in, out). The difference is rounded to the
matrix's dtype, as in the model that the adapter was trained on.

Sources: Meng et al. (PiSSA), arXiv:2404.02948; Büyükakyüz (OLoRA), arXiv:2406.01775; peft 0.21.2, tuners/lora/layer.py.
"""

from __future__ import annotations

import numpy as np

from merge.arrays import F32
from merge.dtypes import DTYPES
from merge.plan import Derived, TensorRef
from merge.sources import Fill, Read

_TORCH = 330 << 20  # bytes that `import torch` takes


def residual(weight: TensorRef, method: str, rank: int, scaling: float, turned: bool) -> TensorRef:
    """The ref of what is left of the matrix."""
    parameters = {"method": method, "rank": rank, "scaling": scaling, "turned": turned}
    return Derived(weight.name, weight.dtype, weight.shape, "residual", (weight,), parameters)


def prepare(ref: Derived, read: Read) -> Fill:
    import torch

    from merge.decode import to_float32
    from merge.kernels.encode import encode
    from merge.kernels.spectral import thin_svd
    from merge.one_thread import ONE_THREAD

    (weight,), parameters = ref.inputs, ref.parameters
    stored = np.empty(ref.size, np.float32)
    read(weight, 0, stored)
    matrix = torch.from_numpy(stored).reshape(ref.shape).to(torch.float64)
    matrix = matrix.T if parameters["turned"] else matrix
    with ONE_THREAD:
        if parameters["method"] == "svd":
            u, s, v = thin_svd(matrix, parameters["rank"])
            taken = (u * s) @ v.T
        else:
            q, r = torch.linalg.qr(matrix)
            taken = parameters["scaling"] * (q[:, : parameters["rank"]] @ r[: parameters["rank"]])
    left = (matrix - taken).T if parameters["turned"] else matrix - taken
    values = left.to(torch.float32).contiguous().numpy().reshape(-1)
    encoded = np.empty(ref.size, DTYPES[ref.dtype].numpy_name)
    encode(values, ref.dtype, encoded)
    to_float32(ref.dtype, encoded, values)

    def fill(start: int, out: F32) -> None:
        out[:] = values[start : start + len(out)]

    return fill


def held_bytes(ref: Derived) -> int:
    longest, shortest = max(ref.shape), min(ref.shape)
    # the matrix, its part and their difference as float64; vectors, Gram matrix and eigenvectors
    return _TORCH + 8 * (4 * ref.size + longest * shortest + 3 * shortest * shortest)
