"""FourierFT: W + s · Re(F⁻¹(S)), S a spectrum of few values at random places. Gao et al., arXiv:2405.03003.

The places are those of torch.randperm(out · in) under the config's seed, as PEFT draws them; for each shape it is drawn
once, which takes 8 bytes for each entry of the matrix for that moment.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from merge.adapter_kinds import AdaptedModule, Kind, Parts, Rows, Settings, Shape, number
from merge.arrays import F64


def settings(module: AdaptedModule, matrix: Shape) -> Settings:
    shape = module.shapes["fourierft_spectrum"]
    if len(shape) != 1 or shape[0] > matrix[0] * matrix[1]:
        raise ValueError(f"fourierft_spectrum: expected a vector, found {list(shape)}")
    return {
        "scaling": number(module.config, "scaling", 150.0),
        "seed": int(number(module.config, "random_loc_seed", 777)),
        "count": shape[0],
    }


def rows(parts: Parts, settings: Settings, matrix: Shape) -> Rows:
    spectrum = parts["fourierft_spectrum"]
    down, across = _places(matrix, settings["seed"], settings["count"])

    def change(first: int, values: F64) -> None:
        for i, row in enumerate(values, first):
            line = np.zeros(matrix[1], np.complex128)
            np.add.at(line, across, spectrum * np.exp(2j * np.pi * (down * i % matrix[0]) / matrix[0]))
            row += settings["scaling"] / matrix[0] * np.fft.ifft(line).real

    return change


@lru_cache(maxsize=16)
def _places(matrix: Shape, seed: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    import torch

    drawn = torch.randperm(matrix[0] * matrix[1], generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.numpy() // matrix[1], drawn.numpy() % matrix[1]


def held(settings: Settings, matrix: Shape) -> int:
    return 8 * matrix[0] * matrix[1]


KIND = Kind(parts=("fourierft_spectrum",), settings=settings, rows=rows, held=held, bitwise=False)
