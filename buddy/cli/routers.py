"""`buddy routers`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from buddy.cli.app import FAILED, PLAIN, app

routers_app = typer.Typer(invoke_without_command=True, **PLAIN)
app.add_typer(routers_app, name="routers", epilog="\b\nExample: buddy routers check shortgpt")


@routers_app.callback()
def _routers(ctx: typer.Context) -> None:
    """List the installed routers, check one, or begin one of your own."""
    if ctx.invoked_subcommand is None:
        list_routers()


@routers_app.command("list", epilog="\b\nExample: buddy routers list")
def list_routers() -> None:
    """List them (as `buddy routers` alone does)."""
    from buddy.console import print_table
    from buddy.registry import describe

    rows = [(d.name, d.kind or "broken", d.problem or d.summary, d.source, d.distribution) for d in describe()]
    print_table(("name", "kind", "what it does", "source", "distribution"), rows)


@routers_app.command(epilog="\b\nExample: buddy routers new ebb-and-flow")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters and digits, joined by hyphens.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to put the package's folder into.")] = Path(),
) -> None:
    """Write a package for a router of your own."""
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
        typer.Option(metavar="NAME|DIR", help="A model in place of a tiny random one, such as smollm2-135m."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the router; once for each.")
    ] = None,
) -> None:
    """Hold a router to what all routers promise."""
    from buddy.console import print_table
    from buddy.testing.kit import check_named

    results = check_named(name, backbone=backbone, options=options or [])
    failed = sum(result.state == "failed" for result in results)
    print_table(("check", "result", "what"), [(r.check, "FAILED" if r.error else r.state, r.line) for r in results])
    typer.echo(f"{name} fails {failed} of {len(results)} checks." if failed else f"{name} passes.")
    if failed:
        raise typer.Exit(FAILED)
