"""The command line: parse, call, print. Each verb is a file and imports what is heavy inside its function."""

from importlib import import_module
from typing import Annotated

import typer

from buddy import __version__
from buddy.cli.app import MULTI_PROCESS, VERBS, app, require_one_process

__all__ = ["app", "main"]

for _verb in VERBS:
    import_module(f"buddy.cli.{_verb}")


def main() -> None:
    """The `buddy` command."""
    app()


def _print_version(requested: bool) -> None:
    if requested:
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
    if ctx.invoked_subcommand not in MULTI_PROCESS:
        require_one_process(f"`buddy {ctx.invoked_subcommand}` is done")
