"""What this tool promises for every architecture, tried on tiny models: writes the table of docs/architectures.md.

    python benchmarks/architecture_contract.py [NAME...]

The models are those of tests/architectures.py, the promises those of tests/contract.py, and a test tries them all. With
names, the rows are printed and nothing is written.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures import names
from contract import CHECKS, Family
from docs_tables import filled

from merge.checkpoint import open_checkpoint
from merge.checkpoint.reader import SourceReader
from merge.errors import CheckpointError, RecipeError
from merge.layerwise import open_runner, whole_model
from merge.recipe.references import parse_reference

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def row(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        family = Family(name, Path(folder))
        kept = []
        for check in CHECKS.values():
            try:
                check(family)
                kept.append("kept")
            except RecipeError:
                kept.append("refused")
            except AssertionError:
                kept.append("**broken**")
        cells = [name, f"`{family.cls.__name__}`", *kept, by_layer(family.path / "base")]
    return f"| {' | '.join(cells)} |\n"


def by_layer(path: Path) -> str:
    """How perplexity, statistics and routers run a model; "-" if it is not a causal language model."""
    checkpoint = open_checkpoint(parse_reference(str(path)))
    try:
        with SourceReader(checkpoint.files) as reader:
            if open_runner(checkpoint, reader, None, lambda note: None) is not None:
                return "streamed"
        whole_model(str(path))
    except CheckpointError:
        return "-"
    return "whole"


def main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name in sys.argv[1:] or names():
        rows.append(row(name))
        print(rows[-1], end="", flush=True)
    if len(sys.argv) > 1:
        return
    head = f"| | class | {' | '.join((*CHECKS, 'layers'))} |\n|---|---|{'---|' * (len(CHECKS) + 1)}\n"
    table = (head + "".join(rows)).rstrip("\n")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "contract", table), encoding="utf-8")


if __name__ == "__main__":
    main()
