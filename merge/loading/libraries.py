"""Silences messages of the libraries that are not for the user, and keeps bitsandbytes from changing weight layouts."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences everything below errors of transformers and bitsandbytes."""
    from transformers.utils import logging as transformers_logging

    bitsandbytes = logging.getLogger("bitsandbytes")
    before = bitsandbytes.level, transformers_logging.get_verbosity()
    # "No module named kernels": an optional speed-up of NF4 on processors.
    bitsandbytes.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft calls functions that transformers will remove in version 6
        warnings.filterwarnings("ignore", "Position ids are not supported")  # a learnt prompt has none, peft says
        try:
            yield
        finally:
            bitsandbytes.setLevel(before[0])
            transformers_logging.set_verbosity(before[1])


def keep_4_bit_layout(model: Module, trained: bool = True) -> None:
    """bitsandbytes would permanently rearrange 4-bit weights for AVX-512 at the first evaluation.

    The product with that layout has no gradient, so training would continue without most of it. The layout also needs
    rows of a multiple of 32, which bitsandbytes does not check.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (trained or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False
