"""What holds for every architecture: tests/architectures.py has the models."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import build, names


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.mark.parametrize("name", names())
def test_transformers_reads_back_what_it_wrote(name: str, tmp_path: Path) -> None:
    import torch

    model = build(name, seed=1, step=0.02)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    kept, loaded = model.state_dict(), again.state_dict()
    assert list(kept) == list(loaded)
    assert [key for key in kept if not torch.equal(kept[key], loaded[key])] == []
