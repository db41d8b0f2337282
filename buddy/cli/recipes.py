"""`buddy recipes`."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from buddy.cli.app import PLAIN, app

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="An installed recipe (`buddy recipes`).")]

recipes_app = typer.Typer(invoke_without_command=True, **PLAIN)
app.add_typer(recipes_app, name="recipes", epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")


@recipes_app.callback()
def _recipes(ctx: typer.Context) -> None:
    """List, show or copy the recipes that come with Buddy."""
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list", epilog="\b\nExample: buddy recipes list")
def list_recipes() -> None:
    """List the recipes (as `buddy recipes` alone does)."""
    from buddy.config import installed_recipes
    from buddy.console import print_table

    rows = [(name, _first_comment(path)) for name, path in installed_recipes().items()]
    print_table(("name", "what it is"), rows)


@recipes_app.command(epilog="\b\nExample: buddy recipes show quickstart")
def show(name: RecipeName) -> None:
    """Print a recipe with its comments."""
    from buddy.config import recipe_path

    typer.echo(recipe_path(name).read_text("utf-8"), nl=False)


@recipes_app.command(epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")
def copy(
    name: RecipeName,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File, or folder: this one unless said otherwise.")
    ] = None,
) -> None:
    """Copy a recipe to a new file of your own."""
    from buddy.config import recipe_path
    from buddy.errors import RecipeError
    from buddy.io import write_text

    path, target = recipe_path(name), destination or Path()
    target = target / path.name if os.path.isdir(target) else target  # os.path answers for names that are too long
    if os.path.lexists(target):
        raise RecipeError(f"{target} exists and is not overwritten; name another file.")
    write_text(target, path.read_text("utf-8"))
    typer.echo(f"Wrote {target}; run it with: buddy fit --recipe {target}")


def _first_comment(path: Path) -> str:
    found = re.search(r"^# *(.*)$", path.read_text("utf-8"), re.MULTILINE)
    return found[1].rstrip() if found else ""
