"""`buddy push`: a run in the hub's layout, into a folder or onto the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from shlex import quote

from buddy.console import results, status
from buddy.errors import RunError
from buddy.handover.card import is_local, run_card
from buddy.handover.folder import whole_folder
from buddy.handover.hub import upload
from buddy.handover.layout import CARD, CONFIG, METRICS, check_files, copy_files, finished, plain_files, write_config
from buddy.handover.sources import folder_of, hub_name
from buddy.io import write_text
from buddy.run import Run, read_metrics


def push(folder: Path, *, to: str, private: bool = False, licence: str | None = None) -> None:
    """Write a run's files, a config.json and a model card, and say where they are.

    Args:
        folder: a finished run.
        to: `owner/name` on the hub, or a folder to make.
        private: make a new repository private.
        licence: of the router's weights, in the hub's words, as "apache-2.0".

    Raises:
        RunError: the run or the place cannot be used.
    """
    name = hub_name(to)
    run = finished(folder)
    check_files(folder, trust_remote_code=True)  # so that whoever pulls it is not the first to find a file missing
    if name is None:
        if private:
            raise RunError(f"--private is for the hub, and {to} is a folder; leave it out.")
        out = folder_of(to)
        with whole_folder(out) as made:
            _fill(made, run, f"./{out.name}", licence)
            files = plain_files(made)
        where = str(out)
    else:
        with tempfile.TemporaryDirectory(prefix="buddy-push-") as made:
            _fill(Path(made), run, name, licence)
            files = plain_files(Path(made))
            with status(f"Uploading to {name} …"):
                where = upload(Path(made), name, private=private)
    _show(run, where, name or to, files)


def _fill(made: Path, run: Run, name: str, licence: str | None) -> None:
    copy_files(run.folder, made, skip=(CARD, CONFIG))
    write_config(made, run)
    metrics = read_metrics(made) if (made / METRICS).is_file() else None
    write_text(made / CARD, run_card(run, metrics, name, licence))


def _show(run: Run, where: str, name: str, files: list[str]) -> None:
    results.print(f"Pushed {run.router_name} for {run.backbone} to {where}: {', '.join(files)}", soft_wrap=True)
    if local := _folders(run):
        results.print(f"Mind: its recipe names folders of this machine, which others see: {local}", soft_wrap=True)
    results.print(f"Use:  buddy pull {quote(name)} --out DIR, or in Python buddy.load({name!r})", soft_wrap=True)


def _folders(run: Run) -> str:
    recipe, data = run.recipe, run.recipe.data
    named: dict[str, list[str | None]] = {
        "backbone.name": [recipe.backbone.name],
        "data.source": [data.source],
        "data.train_sources": [*data.train_sources],
        "data.calibration_sources": [*data.calibration_sources],
        "trainer.ckpt_path": [recipe.trainer.ckpt_path],
        "output": [recipe.output],
    }
    return ", ".join(f"{key} {value}" for key, values in named.items() for value in values if _is_path(key, value))


def _is_path(key: str, value: str | None) -> bool:
    return value is not None and (is_local(value) if key == "backbone.name" else value.startswith(("/", "~")))
