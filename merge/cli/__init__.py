"""The `merge` command: one file a verb, imported when it is called, so that `merge --help` is quick."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

# verb -> (module, one line for --help)
VERBS = {
    "run": ("merge.cli.run", "Merge: carry out a recipe and write the checkpoint."),
    "plan": ("merge.cli.plan", "Show what a recipe would do; nothing is written."),
    "verify": ("merge.cli.verify", "Check a merged checkpoint against its manifest."),
    "methods": ("merge.cli.methods", "List the merge methods, or explain one."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        import difflib

        if args and args[0] not in VERBS and (near := difflib.get_close_matches(args[0], VERBS, 1)):
            ctx.fail(f'no such command "{args[0]}"; did you mean "{near[0]}"?')
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    epilog="""\b
Examples:
  merge run recipes/quickstart.yaml
  merge plan recipe.yaml --tensors
  merge verify merged/quickstart
  merge methods ties""",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(None, "--version", package_name="merge-workbench", prog_name="merge")
def cli() -> None:
    """Merge language models on a laptop: streamed, exact, resumable, verified."""


def main() -> None:
    """Runs the command line; every error of ours becomes one message and its exit code."""
    from merge.errors import MergeError

    try:
        code = cli(prog_name="merge", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MergeError as error:
        click.echo(f"merge: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("merge: stopped; what is done is kept. Run the same command again to go on.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
