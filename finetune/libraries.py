"""Silences messages of the libraries that are not for the user: deprecations, and notes at import."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


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
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers will remove in its version 6
        warnings.filterwarnings("ignore", "Position ids are not supported")  # a learnt prompt has none, peft says
        try:
            yield
        finally:
            bitsandbytes.setLevel(before[0])
            transformers_logging.set_verbosity(before[1])
