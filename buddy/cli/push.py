"""`buddy push`."""

from typing import Annotated

import typer

from buddy.cli.app import RunOption, app


@app.command(epilog="\b\nExample: buddy push --run runs/quickstart/buddy --to ./shared")
def push(
    run: RunOption,
    to: Annotated[str, typer.Option(metavar="REPO|DIR", help="owner/name on the hub, or a folder to make.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Of the router's weights, such as apache-2.0.")
    ] = None,
) -> None:
    """Hand a run over, to a folder or the hub."""
    from buddy.hub.push_pull import push as run_push

    run_push(run, to=to, private=private, licence=license)
