"""Model directories of small files, opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoint import Checkpoint, open_checkpoint
from merge.errors import CheckpointError
from merge.recipe.model import ModelRef


def opened(path: Path | str) -> Checkpoint:
    return open_checkpoint(ModelRef(str(path), str(path)))


def refused(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    return str(caught.value)


def save(path: Path, *names: str) -> None:
    save_file({name: torch.ones(2, 3) for name in names}, str(path))
