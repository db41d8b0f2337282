"""The command line: parse, call, print. A verb a file; everything heavy is imported inside the verb that needs it."""

from importlib import import_module
from typing import Annotated

import typer

from buddy import __version__
from buddy.cli.app import TOGETHER, VERBS, app
from buddy.cli.words import alone

__all__ = ["app", "main"]

for _verb in VERBS:
    import_module(f"buddy.cli.{_verb}")


def main() -> None:
    """The `buddy` command."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"buddy {__version__}")
        raise typer.Exit


@app.callback()
def _buddy(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Dynamic depth for language models: one router, every compute budget."""
    if ctx.invoked_subcommand not in TOGETHER:
        alone(f"`buddy {ctx.invoked_subcommand}` is done")
