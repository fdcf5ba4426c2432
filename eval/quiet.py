"""Silences everything below errors in the libraries; this package reports what matters."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

from merge.loading import library


def quiet() -> None:
    """Turns off warnings and progress bars of lm-eval, datasets and transformers for the rest of the process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    logging_of_transformers = library().utils.logging
    logging_of_transformers.set_verbosity_error()
    logging_of_transformers.disable_progress_bar()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppresses tqdm's bars and prints inside: there is one progress bar, and stdout is for results."""
    import tqdm

    before = tqdm.tqdm.__init__

    def silent(self: tqdm.tqdm, *arguments: object, **keywords: object) -> None:
        before(self, *arguments, **keywords | {"disable": True})

    tqdm.tqdm.__init__ = silent
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.tqdm.__init__ = before
