"""merge verify: Check a merged checkpoint against its manifest."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge.cli.options import PATH, Size, check_device, json_flag, method_file_option, no_bar_option, trust_option
from merge.errors import UsageError
from merge.quoting import counted
from merge.show.terminal import printable, progress_bar, size

if TYPE_CHECKING:
    from merge.tools.rebuild import Rebuild


@click.command(
    "verify",
    epilog="""\b
Examples:
  merge verify merged/quickstart
  merge verify merged/quickstart --rebuild --recipe-dir recipes""",
)
@click.argument("directory", type=PATH)
@click.option("--threads", type=click.IntRange(1, 1024), help="Reading threads.  [default: all processors]")
@click.option("--sha256", is_flag=True, help="Also print the SHA-256 of each weight file, as the Hub shows it.")
@click.option("--rebuild", "again", is_flag=True, help="Also merge again from the recorded recipe and compare.")
@click.option("--recipe-dir", type=PATH, help="Directory of the recipe, for models beside it.")
@click.option("--max-ram", type=Size(), help="Limit on memory for --rebuild, e.g. 1GiB.")
@click.option("--device", default="cpu", show_default=True, help="Device for --rebuild: cpu or cuda.")
@method_file_option
@no_bar_option
@json_flag("Print the findings as JSON.")
@trust_option
def command(
    directory: Path,
    threads: int | None,
    sha256: bool,
    again: bool,
    recipe_dir: Path | None,
    max_ram: int | None,
    device: str,
    method_files: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Check DIRECTORY, a merged checkpoint, against its manifest: every file, header and tensor.

    With --rebuild, merge it again from its recipe and sources: tensors must have the same bytes if the method
    promises that, and otherwise be equal to rounding.
    """
    from merge.output.verify import verify_output

    _check_options(again, recipe_dir=recipe_dir, max_ram=max_ram, method_file=method_files)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory.is_dir() else 0
    with progress_bar("verify", total, quiet or not sys.stderr.isatty()) as progress:
        verdict = verify_output(directory, threads=threads, progress=lambda done, _: progress(done))
    found: Rebuild | None = None
    if again and not verdict.problems:
        from merge.methods.method_file import load_method_file
        from merge.tools.rebuild import rebuild

        check_device(device)
        for file in method_files:
            load_method_file(file)
        with progress_bar("rebuild", total, quiet or not sys.stderr.isatty()) as progress:
            found = rebuild(
                directory, recipe_dir=recipe_dir, threads=threads, max_ram=max_ram, device=device, progress=progress
            )
    sums = _sha256(directory) if sha256 else {}
    if as_json:
        more: dict[str, Any] = {"sha256": sums} if sha256 else {}
        if found is not None:
            more["rebuild"] = dataclasses.asdict(found) | {"agrees": found.agrees}
        click.echo(json.dumps(dataclasses.asdict(verdict) | more))
    else:
        for name, digest in sums.items():
            click.echo(f"{digest}  {name}")
        for problem in verdict.problems:
            click.echo(problem)
        if not verdict.problems:
            checked = f"{counted(verdict.tensors, 'tensor')} and {counted(verdict.files, 'file')} as written"
            click.echo(f"{directory}: {checked}, {size(verdict.bytes_checked)}")
        if found is not None:
            _show(directory, found)
    if verdict.problems:
        places = counted(len(verdict.problems), "place")
        not_merged = " It was not merged again." if again else ""
        click.echo(f"merge: {directory} differs from its manifest in {places}.{not_merged}", err=True)
        sys.exit(1)
    if found is not None and not found.agrees:
        click.echo(f"merge: {directory} differs from what its recipe and sources produce now.", err=True)
        sys.exit(1)


def _check_options(again: bool, **options: object) -> None:
    for name, value in options.items():
        if value and not again:
            raise UsageError(f"--{name.replace('_', '-')} is for --rebuild; add that, or leave it out.")


def _show(directory: Path, found: Rebuild) -> None:
    for version in found.versions:
        click.echo(f"made by {version}")
    for line in found.sources:
        click.echo(line)
    for difference in found.outside:
        click.echo(
            f"{printable(difference.name)}: {difference.values:,} of {difference.of:,} values differ, by at most "
            f"{difference.largest:.3g} ({difference.relative:.2g} of the largest magnitude)"
        )
    for line in found.other:
        click.echo(printable(line))
    if not found.equal and found.sources and not found.outside:
        return
    counts = f"{counted(found.equal, 'tensor')} with the same bytes"
    if found.within:
        most = max(found.within, key=lambda each: each.relative)
        counts += f", {len(found.within)} equal to rounding (by at most {most.relative:.2g} of the largest magnitude)"
    if found.outside:
        counts += f", {len(found.outside)} different"
    click.echo(f"{directory}: merged again: {counts}")


def _sha256(directory: Path) -> dict[str, str]:
    import hashlib

    sums = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
