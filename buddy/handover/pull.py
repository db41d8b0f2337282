"""`buddy pull`: a pushed run, from a folder or the hub, as a run folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from shlex import quote

from buddy.config import to_yaml
from buddy.console import results, status
from buddy.errors import RunError
from buddy.handover.folder import whole_folder
from buddy.handover.hub import download
from buddy.handover.layout import CONFIG, check_files, copy_files, with_backbone, write_config
from buddy.handover.sources import folder_of, hub_name
from buddy.io import checksum, read_json, write_json, write_text
from buddy.run import FACTS, RECIPE, Run


def pull(
    source: str,
    *,
    out: Path,
    revision: str | None = None,
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make a run folder of what `push` made; its files are the same to the bit.

    Args:
        source: `owner/name` on the hub, or a folder.
        out: the run folder to make.
        revision: branch, tag or commit, on the hub only.
        backbone: written into its recipe instead of the name there, for a backbone that lies elsewhere here.
        trust_remote_code: let its recipe ask for the Python of its backbone's repository.

    Raises:
        RunError: the source or the place cannot be used. Nothing is left at `out` then.
    """
    if backbone is not None and not backbone.strip():
        raise RunError("The backbone's name is empty; name one, or leave --backbone out.")
    if backbone is not None and backbone.startswith(("/", ".", "~")) and not os.path.isdir(folder_of(backbone)):
        raise RunError(f"There is no folder {backbone} for the backbone; check the path.")
    with whole_folder(out) as made:
        run = fetch(source, made, revision=revision, trust_remote_code=trust_remote_code)
        if backbone is not None:
            _rename_backbone(made, run, backbone)
    place = quote(str(out))
    results.print(f"Pulled {run.router_name} for {backbone or run.backbone} into {out}", soft_wrap=True)
    results.print(
        f'Use: buddy generate --run {place} --budget 0.75 "…", or buddy evaluate --run {place}', soft_wrap=True
    )


def fetch(source: str, made: Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Run:
    """Fill an empty folder with the files of a run, checked.

    Raises:
        RunError: there is no run, it is damaged, or asks for what is not allowed.
    """
    name = existing(source, revision)
    if name is None:
        copy_files(folder_of(source), made)
    else:
        with tempfile.TemporaryDirectory(prefix="buddy-pull-") as scratch, status(f"Downloading {name} …"):
            copy_files(download(name, revision, Path(scratch)), made)
    return check_files(made, called=name or source.rstrip("/"), trust_remote_code=trust_remote_code)


def existing(source: str, revision: str | None = None) -> str | None:
    """The hub's name that a source stands for; None where it is a folder, which is there.

    Raises:
        RunError: there is no such folder, or a folder was asked for by revision.
    """
    there = os.path.isdir(folder_of(source)) if source.strip() else False
    name = None if there else hub_name(source)
    if name is None and not there:
        raise RunError(f"There is no folder {source}; check the path, or give owner/name for the hub.")
    if name is None and revision is not None:
        raise RunError(f"{source} is a folder and has no revisions; leave out revision {revision!r}.")
    return name


def _rename_backbone(made: Path, run: Run, backbone: str) -> None:
    renamed = with_backbone(run, backbone)
    write_text(made / RECIPE, to_yaml(renamed.recipe))
    if (made / CONFIG).is_file():
        write_config(made, renamed)
    facts = read_json(made / FACTS)
    sums = facts.get("checksums", {}) | {RECIPE: checksum(made / RECIPE)}
    write_json(made / FACTS, facts | {"backbone": backbone, "checksums": sums})
