"""Orthogonal matching pursuit: each target as a combination of k atoms.

Pati, Rezaiifar and Krishnaprasad 1993; for embeddings: Goddard and Fernandes Neto 2025, "Training-Free Tokenizer
Transplantation via Orthogonal Matching Pursuit" (arXiv:2506.06607), section 3. In each round the atom whose inner
product with what is left is largest joins the others, and all coefficients are fitted again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from merge.arrays import F32

_RIDGE = 1e-12  # of the mean square of the atoms, so that two equal atoms have a solution too
_SCORES = 1 << 24  # inner products held at once


def batch_size(n_atoms: int) -> int:
    """Targets per batch. It depends only on the atoms, and so does the result."""
    return max(1, min(256, _SCORES // max(1, n_atoms)))


def held_bytes(n_atoms: int, width: int, k: int) -> int:
    """Bytes that `match` takes for one batch, besides the atoms."""
    n = batch_size(n_atoms)
    return n * (8 * n_atoms + 3 * 4 * k * width + 8 * 4 * width + 8 * 4 * k * k)


def match(
    targets: F32, atoms: F32, k: int, device: str = "cpu"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Atoms and coefficients for a batch of targets.

    Args:
        targets: (n, width).
        atoms: (n_atoms, width), with n_atoms >= k.
        device: for torch.

    Returns:
        (n, k) indices of atoms, each once in a row, in the order they were chosen; (n, k) float64 coefficients.
    """
    import torch

    points = torch.from_numpy(atoms).to(device)
    wanted = torch.from_numpy(targets).to(device)
    n, width = wanted.shape
    chosen = torch.zeros((n, k), dtype=torch.int64, device=device)
    picked = torch.zeros((n, k, width), dtype=torch.float32, device=device)
    gram = torch.zeros((n, k, k), dtype=torch.float64, device=device)
    projected = torch.zeros((n, k, 1), dtype=torch.float64, device=device)
    coefficients = projected[:, :0]
    left = wanted
    for t in range(k):
        scores = (left @ points.T).abs_()
        scores.scatter_(1, chosen[:, :t], -1.0)  # none is chosen twice
        chosen[:, t] = scores.argmax(dim=1)
        picked[:, t] = points[chosen[:, t]]
        new = picked[:, t].double()
        products = (picked[:, : t + 1].double() @ new.unsqueeze(-1)).squeeze(-1)
        gram[:, t, : t + 1] = products
        gram[:, : t + 1, t] = products
        projected[:, t, 0] = (new * wanted.double()).sum(dim=1)
        system = gram[:, : t + 1, : t + 1].clone()
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + 1e-30
        coefficients = torch.linalg.solve(system, projected[:, : t + 1])
        approximation = (coefficients.transpose(1, 2).float() @ picked[:, : t + 1]).squeeze(1)
        left = wanted - approximation
    return chosen.cpu().numpy(), coefficients.squeeze(-1).cpu().numpy()


def combine(chosen: npt.NDArray[np.int64], coefficients: npt.NDArray[np.float64], rows: F32) -> F32:
    """(n, k) atoms with their coefficients -> (n, width) the same combinations of other rows, summed in float64."""
    result = np.empty((len(chosen), rows.shape[1]), np.float32)
    for i, (places, factors) in enumerate(zip(chosen, coefficients, strict=True)):
        result[i] = factors @ rows[places].astype(np.float64)
    return result
