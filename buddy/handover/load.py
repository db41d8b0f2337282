"""`buddy.load`: a run as a model that generates."""

from __future__ import annotations

import os
from pathlib import Path

from buddy.build import load_model
from buddy.errors import RunError
from buddy.handover.layout import check_files, with_backbone
from buddy.hub.load import Model
from buddy.hub.push_pull import download, folder_of, hub_name
from buddy.run import read_run


def load(
    run: str | Path, *, backbone: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Model:
    """The model of a run, ready to generate: `buddy.load("runs/quickstart/buddy").generate("Once", budget=0.75)`.

    Args:
        run: a run folder, one that `buddy push` or `buddy pull` made, or `owner/name` on the hub.
        backbone: loaded instead of the one that the run names, for one that lies elsewhere here.
        revision: branch, tag or commit, on the hub only.
        trust_remote_code: let a run from the hub ask for the Python of its backbone's repository.

    Raises:
        BuddyError: the run or its backbone cannot be used.
    """
    folder = folder_of(str(run))
    name = None if isinstance(run, Path) or os.path.isdir(folder) else hub_name(run)
    if name is None and revision is not None:
        raise RunError(f"{run} is a folder and has no revisions; leave out revision {revision!r}.")
    if name is None:
        found = read_run(folder)
    else:
        found = check_files(download(name, revision), called=name, trust_remote_code=trust_remote_code)
    return Model(load_model(found if backbone is None else with_backbone(found, backbone), merged=True))
