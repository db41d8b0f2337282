"""Verbs that need no run: memory; routers and recipes, which list, show, copy, create and check."""

import json
import os
import re
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from buddy.cli.app import FAILED, PLAIN, JsonOption, app, split_budgets

Dtype = Literal["bfloat16", "float16", "float32"]
Strategy = Literal["auto", "fsdp"]
RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="An installed recipe (`buddy recipes`).")]


@app.command("plan", hidden=True)  # the verb's name in 0.1
@app.command(epilog="\b\nExample: buddy memory --backbone smollm2-135m --devices 2 --strategy fsdp")
def memory(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR|FILE", help="A backbone's name, its folder, or a config.json alone.")
    ],
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices to train on.")] = 1,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="Budgets of the caches: 0.75 or 22layers, for example.")
    ] = None,
    window: Annotated[int, typer.Option(min=18, metavar="W", help="Tokens in a training window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Windows a step, over all devices.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights and the cache.")] = "bfloat16",
    strategy: Annotated[Strategy, typer.Option(help="auto copies the weights, fsdp shards them.")] = "auto",
    router: Annotated[str, typer.Option(metavar="NAME", help="An installed router.")] = "buddy",
    json: JsonOption = None,
) -> None:
    """Print how much memory training and serving take."""
    parsed = split_budgets(budgets)
    from buddy.footprint import print_memory

    print_memory(
        backbone,
        devices=devices,
        budgets=parsed,
        window=window,
        batch_size=batch_size,
        dtype=dtype,
        strategy=strategy,
        router=router,
        json_file=json,
    )


routers_app = typer.Typer(invoke_without_command=True, **PLAIN)
app.add_typer(routers_app, name="routers", epilog="\b\nExample: buddy routers check shortgpt")


@routers_app.callback()
def _routers(ctx: typer.Context) -> None:
    """List the installed routers, check one, or create a new one."""
    if ctx.invoked_subcommand is None:
        list_routers()


@routers_app.command("list", epilog="\b\nExample: buddy routers list")
def list_routers() -> None:
    """List the routers, like `buddy routers`."""
    from buddy.console import print_table
    from buddy.registry import describe

    rows = [(d.name, d.kind or "broken", d.problem or d.summary, d.source, d.distribution) for d in describe()]
    print_table(("name", "kind", "what it does", "source", "distribution"), rows)


@routers_app.command(epilog="\b\nExample: buddy routers new ebb-and-flow")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters and digits, joined by hyphens.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder that will contain the package's folder.")] = Path(),
) -> None:
    """Create a package for a new router."""
    from buddy.scaffold import new_router

    folder = new_router(name, out)
    place = quote(str(folder) if folder.is_absolute() else f"./{folder}")
    typer.echo(
        f"Wrote {folder}; install it with: pip install -e {place}\nThen check it with: buddy routers check {name}"
    )


@routers_app.command(epilog="\b\nExample: buddy routers check evopress --options generations=2 --options offspring=4")
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed router, or my_module:MyRouter.")],
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="A model instead of a tiny random one, such as smollm2-135m."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the router; once for each.")
    ] = None,
) -> None:
    """Check that a router meets the contract of all routers."""
    from buddy.backbone.load import load_backbone
    from buddy.config import override
    from buddy.console import print_table, status, track
    from buddy.schema import Recipe
    from buddy.testing import CHECKS, Subject

    overrides = [f"router.name={json.dumps(name)}", *(f"router.options.{text}" for text in options or [])]
    given = override(Recipe(), overrides, f"Router {name!r}").router.options
    subject = Subject(name, given)  # on the tiny model first, which finds mistakes quickly
    if backbone is not None:
        with status(f"Loading {backbone} …"):
            subject = Subject(name, given, load_backbone(backbone, "float32"))
    results = [each.examine(subject) for each in track(CHECKS, f"Checking {name}")]
    failed = sum(result.state == "failed" for result in results)
    print_table(("check", "result", "what"), [(r.check, "FAILED" if r.error else r.state, r.line) for r in results])
    typer.echo(f"{name} fails {failed} of {len(results)} checks." if failed else f"{name} passes.")
    if failed:
        raise typer.Exit(FAILED)


recipes_app = typer.Typer(invoke_without_command=True, **PLAIN)
app.add_typer(recipes_app, name="recipes", epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")


@recipes_app.callback()
def _recipes(ctx: typer.Context) -> None:
    """List, show or copy the recipes that come with Buddy."""
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list", epilog="\b\nExample: buddy recipes list")
def list_recipes() -> None:
    """List the recipes, like `buddy recipes`."""
    from buddy.config import installed_recipes
    from buddy.console import print_table

    rows = [(name, _first_comment(path)) for name, path in installed_recipes().items()]
    print_table(("name", "what it is"), rows)


@recipes_app.command(epilog="\b\nExample: buddy recipes show quickstart")
def show(name: RecipeName) -> None:
    """Print a recipe with its comments."""
    from buddy.config import recipe_path

    typer.echo(recipe_path(name, files=False).read_text("utf-8"), nl=False)


@recipes_app.command(epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")
def copy(
    name: RecipeName,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder; by default the current folder.")
    ] = None,
) -> None:
    """Copy a recipe to a new file."""
    from buddy.config import recipe_path
    from buddy.errors import RecipeError
    from buddy.io import write_text

    path, target = recipe_path(name, files=False), destination or Path()
    target = target / path.name if os.path.isdir(target) else target  # os.path answers for names that are too long
    if os.path.lexists(target):
        raise RecipeError(f"{target} exists and is not overwritten; name another file.")
    write_text(target, path.read_text("utf-8"))
    bare = target.parent == Path() and not target.suffix  # an installed recipe may have this name
    shown = f"./{target}" if bare else target
    typer.echo(f"Wrote {target}; run it with: buddy fit --recipe {quote(str(shown))}")


def _first_comment(path: Path) -> str:
    found = re.search(r"^# *(.*)$", path.read_text("utf-8"), re.MULTILINE)
    return found[1].rstrip() if found else ""
