"""`buddy export`."""

from pathlib import Path
from typing import Annotated

import typer

from buddy.cli.app import RunOption, app


@app.command(epilog="\b\nExample: buddy export --run runs/quickstart/shortgpt --budget 0.75 --out shortgpt-22layers")
def export(
    run: RunOption,
    budget: Annotated[str, typer.Option(metavar="B", help="A fraction such as 0.75, or 22layers.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to choose the plan on instead of the recipe's.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Hold the checkpoint's logits against the engine's, in float32.")
    ] = True,
) -> None:
    """Cut the backbone to one plan, for stock transformers."""
    from buddy.hub.export import export_run

    export_run(run, budget=budget, out=out, data=data, check=check)
