"""`buddy pull`."""

from pathlib import Path
from typing import Annotated

import typer

from buddy.cli.app import app


@app.command(epilog="\b\nExample: buddy pull ./shared --out pulled")
def pull(
    source: Annotated[str, typer.Argument(metavar="REPO|DIR", help="owner/name on the hub, or a folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder to make.")],
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A branch, tag or commit on the hub.")] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="Where the backbone lies here, if not where its recipe says.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the run ask for the Python of its backbone's repository.")
    ] = False,
) -> None:
    """Get a run that was pushed, as a run folder."""
    from buddy.hub.push_pull import pull as run_pull

    run_pull(source, out=out, revision=revision, backbone=backbone, trust_remote_code=trust_remote_code)
