"""Reads model directories and hub ids: config, side files, and where each tensor's bytes lie.

    checkpoint.py        open_checkpoint: the one verb; everything below serves it
    hub.py               a hub id -> a directory of the local cache
    files.py             paths that stay inside the directory; small JSON files; side files
    layout.py            which files of the directory hold the weights
    index.py             what the index of a sharded checkpoint says
    weight_file.py       the tensors of one of them, of whatever kind
    tensors.py           weight files -> one dictionary of tensors
    safetensors_file.py  the header of one safetensors file, checked
    trust.py             whether Python code from a model's directory may run: only if the user named the model
    pickle_file.py       the tensors of one torch pickle, without torch
    unpickler.py         the pickle reader that cannot run code
    formats/             quantised weights: one file a format
    reader.py            SourceReader: bounded reads of elements, for the engine

Nothing but reader.py reads a byte of a tensor.
"""

from merge.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
