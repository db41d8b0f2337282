"""`buddy inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from buddy.cli.app import RunOption, app, split_budgets


@app.command(epilog="\b\nExample: buddy inspect --run runs/quickstart/buddy --budgets 0.75 --text 'To be or not'")
def inspect(
    run: RunOption,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", "--budget", metavar="B,B…", help="Instead of the recipe's: 0.75, 22layers or 15ms."),
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(metavar="SOURCE,…", help="Texts instead of the recipe's; label=SOURCE gives one a name."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Look at this text alone, token by token.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Windows of each domain at most.", show_default="16")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for all that is written, instead of the run's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there as JSON.")] = None,
) -> None:
    """Show which layers run for which token, per budget and text."""
    asked = split_budgets(budgets)
    from buddy.inspection.inspect import inspect_run

    inspect_run(run, budgets=asked, domains=domains, text=text, windows=windows, out=out, json_file=json)
