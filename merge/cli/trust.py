"""The option of all verbs that load models: whose Python code may run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from merge.cli.show import printable
from merge.loading.trust import FLAG, trusting

Function = TypeVar("Function", bound=Callable[..., Any])


def trust_option(function: Function) -> Function:
    """Adds the option; the command runs with these models trusted."""

    @functools.wraps(function)
    def command(*arguments: Any, trust_remote_code: tuple[str, ...], **keywords: Any) -> Any:
        def say(text: str) -> None:
            if not keywords.get("quiet"):
                click.echo(f"note: {printable(text)}", err=True)

        with trusting(*trust_remote_code, say=say):
            return function(*arguments, **keywords)

    option = click.option(
        FLAG,
        multiple=True,
        metavar="MODEL",
        help="Allow this model's own Python code to run; may be repeated.",
    )
    return option(command)  # type: ignore[return-value]
