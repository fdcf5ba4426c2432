"""Reads the tensors of one weight file of any kind."""

from __future__ import annotations

from merge.checkpoint.safetensors_file import read_header
from merge.plan import TensorRef
from merge.recipe.references import GGUF


def read_file(path: str) -> tuple[list[TensorRef], list[str]]:
    """Its tensors, and notes."""
    if path.endswith(".safetensors"):
        return [*read_header(path)[0]], []
    if path.endswith(GGUF):
        from merge.checkpoint.gguf_file import read_gguf  # needs the extra

        return read_gguf(path)
    from merge.checkpoint.pickle_file import read_pickle  # rarely needed

    return read_pickle(path)
