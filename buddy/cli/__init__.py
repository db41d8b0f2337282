"""The command line: parse, call, print. Verbs import heavy modules inside their functions."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from buddy import __version__
from buddy.cli import fitting, runs, tools  # noqa: F401 - they register the verbs, in the order of --help
from buddy.cli.app import MULTI_PROCESS, app, require_one_process

__all__ = ["app", "main"]


def main() -> None:
    """The `buddy` command."""
    if isinstance(sys.stdout, TextIOWrapper):  # tables have signs that not every terminal's encoding has
        sys.stdout.reconfigure(errors="replace")
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
