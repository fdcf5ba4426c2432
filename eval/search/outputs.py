"""What a search leaves in its directory: best.yaml, trials.json, report.json and page.html, beside the study.

Directory: study.sqlite and its locks come first; the others are written whole when the search ends, or is interrupted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eval.search.judges import Judge
from eval.search.objective import Scores
from eval.search.page import page
from eval.search.record import SearchRow
from eval.search.run import Found
from eval.search.study import FILE
from merge.errors import OutputError, UsageError
from merge.output.directory import write_whole

FORMAT = 1
BEST, TRIALS, REPORT, PAGE = "best.yaml", "trials.json", "report.json", "page.html"


def prepare(out: Path, resume: bool, force: bool) -> None:
    """Makes the directory, or checks that a search is in it; with `force` discards that.

    Raises:
        UsageError: something else is there; nothing to resume.
    """
    there = out / FILE
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} exists and is not a directory; nothing was changed. Choose another --out.")
    if resume and not there.is_file():
        raise UsageError(f"--resume: {out} holds no search. Leave it out to begin one.")
    if out.is_dir() and any(out.iterdir()) and not there.is_file() and not (out / "study.lock").is_file():
        raise UsageError(f"{out} exists and holds no search; nothing was changed. Choose another --out.")
    if force:
        for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", BEST, TRIALS, REPORT, PAGE):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def write_outputs(out: Path, found: Found, judge: Judge) -> dict[str, Path]:
    """The files that were written, by what they are."""
    texts = {"trials": (TRIALS, trials_json(found, judge))}
    if found.recipe is not None:
        texts["recipe"] = (BEST, _best(found))
    if found.report is not None:
        texts["report"] = (REPORT, found.report.to_json())
    texts["page"] = (PAGE, page(found))
    written = {}
    for label, (name, text) in texts.items():
        try:
            write_whole(out / name, text.encode())
        except OSError as error:
            raise OutputError(f"{out / name}: cannot be written ({error.strerror}).") from error
        written[label] = out / name
    return written


def _best(found: Found) -> str:
    """The plain recipe, with a comment that says where it comes from."""
    assert found.best is not None
    assert found.best.recipe is not None
    source = os.path.basename(found.space.file or "a recipe")
    lines = [f"# The best of {found.n_trials} trials of merge search on {source}: {found.best.name}."]
    if found.test_sets:
        lines.append(f"# It was chosen on test sets of leaderboards: {', '.join(found.test_sets)}.")
    return "\n".join([*lines, found.best.recipe])


def trials_json(found: Found, judge: Judge) -> str:
    """Everything but the scores of single items."""
    best = None if found.best is None else found.best.name
    front = [row.name for row in found.front] if len(found.objective.names(found.tasks)) > 1 else []
    data: dict[str, Any] = {
        "format": FORMAT,
        "objectives": found.objective.names(found.tasks),
        "best": best,
        "front": front,
        "test_sets": found.test_sets,
        "interrupted": found.interrupted,
        **judge.about(),
        "rows": [_row(row) for row in found.rows],
    }
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def _row(row: SearchRow) -> dict[str, Any]:
    said: dict[str, Any] = {"name": row.name, "kind": row.kind, "state": row.state, "values": row.values}
    said |= {"scores": _plain(row.scores), "places": dict(row.written), "violation": row.violation}
    if row.state == "stopped":
        said |= {"rounds_asked": row.asked, "rounds": row.rounds}
    if row.refused:
        said["refused"] = row.refused
    return said | {"seconds": round(row.seconds, 3), "recipe": row.recipe}


def _plain(scores: Scores) -> dict[str, float]:
    return {task: score.value for task, score in scores.items()}
