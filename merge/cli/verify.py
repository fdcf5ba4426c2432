"""merge verify"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from merge.cli.show import progress_bar, size


@click.command("verify", epilog="\b\nExample:\n  merge verify merged/quickstart")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads that read.  [default: all processors]")
@click.option("--sha256", is_flag=True, help="Also print the SHA-256 of each weight file, as the Hub shows it.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(directory: Path, threads: int | None, sha256: bool, quiet: bool, as_json: bool) -> None:
    """Check DIRECTORY, a merged checkpoint, against its manifest: every file, header and tensor."""
    from merge.output.verify import verify_output

    total = sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory.is_dir() else 0
    with progress_bar("verify", total, quiet or not sys.stderr.isatty()) as progress:
        verdict = verify_output(directory, threads=threads, progress=lambda done, _: progress(done))
    sums = _sha256(directory) if sha256 else {}
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(verdict) | ({"sha256": sums} if sha256 else {})))
    else:
        for name, digest in sums.items():
            click.echo(f"{digest}  {name}")
        for problem in verdict.problems:
            click.echo(problem)
        if not verdict.problems:
            checked = f"{verdict.tensors} tensors and {verdict.files} files as written"
            click.echo(f"{directory}: {checked}, {size(verdict.bytes_checked)}")
    if verdict.problems:
        places = "1 place" if len(verdict.problems) == 1 else f"{len(verdict.problems)} places"
        click.echo(f"merge: {directory} differs from its manifest in {places}.", err=True)
        sys.exit(1)


def _sha256(directory: Path) -> dict[str, str]:
    import hashlib

    sums = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
