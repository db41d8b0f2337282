"""The files by which a run is handed over, and nothing else: text, JSON, and safetensors; no pickle, no links, no code.

A folder of them is a run folder, so every command takes it as it is.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from buddy.backbone.adapter import FILES as ADAPTER_FILES
from buddy.errors import DamagedError, RunError
from buddy.io import checksum, load_tensors, read_json, write_json, writing
from buddy.run import ADAPTER, FACTS, INPUTS, METRICS, PREDICTOR, PREDICTOR_FACTS, RECIPE, ROUTER, Run, read_run

CARD, CONFIG = "README.md", "config.json"
NEEDED = (RECIPE, FACTS, ROUTER)
HEALED = tuple(f"{ADAPTER}/{name}" for name in ADAPTER_FILES)
FILES = (*NEEDED, METRICS, INPUTS, PREDICTOR, PREDICTOR_FACTS, *HEALED, CONFIG, CARD)


def finished(folder: Path) -> Run:
    """A run that is whole; RunError where it is not."""
    run = read_run(folder)
    if run.status != "finished":
        raise RunError(f"The run {folder} is not finished; go on with the same `buddy fit` that began it.")
    return run


def plain_files(folder: Path) -> list[str]:
    """Those of `FILES` that lie in a folder.

    Raises:
        RunError: one is a link, which could lead anywhere, or no file.
    """
    found = []
    for name in FILES:
        path = folder / name
        linked = path.is_symlink() or (path.parent != folder and path.parent.is_symlink())
        if linked or (path.exists() and not path.is_file()):
            raise RunError(f"{path} is not a plain file; put the file itself there.")
        if path.is_file():
            found.append(name)
    return found


def copy_files(source: Path, target: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy `plain_files` into an empty folder; whatever else lies there stays behind.

    Raises:
        RunError: a file is a link, or cannot be read or written.
    """
    for name in plain_files(source):
        if name not in skip:
            with writing(target):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, target / name)


def write_config(folder: Path, run: Run) -> None:
    """Write config.json: the resolved recipe, what it was made with, and for which backbone, for programs to read."""
    value = {
        "library_name": "buddy-depth",
        "router": run.router_name,
        "backbone": run.backbone,
        "fingerprint": run.fingerprint,
        "geometry": run.geometry,
        "versions": run.versions,
        "recipe": asdict(run.recipe),
    }
    write_json(folder / CONFIG, value)


def with_backbone(run: Run, backbone: str) -> Run:
    """The run with its backbone under another name."""
    section = replace(run.recipe.backbone, name=backbone, revision=None)
    return replace(run, recipe=replace(run.recipe, backbone=section), backbone=backbone)


def check_files(folder: Path, *, called: str | None = None, trust_remote_code: bool = False) -> Run:
    """The run in a folder that somebody else made, every file of it read.

    Args:
        folder: where it lies.
        called: what people know the folder as, for errors.
        trust_remote_code: let its recipe ask for the Python of its backbone's repository.

    Raises:
        RunError: a file is missing, DamagedError, or names what lies outside; or the recipe asks for code.
    """
    try:
        return _checked(folder, trust_remote_code)
    except RunError as error:
        raise RunError(str(error).replace(str(folder), called or str(folder))) from error


def _checked(folder: Path, trust_remote_code: bool) -> Run:
    for name in NEEDED:
        if not (folder / name).is_file():
            raise RunError(f"{folder} holds no run: {name} is missing; name what `buddy push` made, or a run folder.")
    sums = read_json(folder / FACTS).get("checksums", {})
    if not isinstance(sums, dict) or not sums.keys() <= set(FILES):
        raise DamagedError(folder / FACTS, "checksums is not what Buddy writes")
    for name in sums.keys() - {CONFIG, CARD}:
        if checksum(folder / name) != sums[name]:
            raise DamagedError(folder / name, "it is not what was written")
    run = finished(folder)
    for path in (folder / name for name in FILES):
        if path.is_file() and path.suffix == ".safetensors":
            load_tensors(path)
        elif path.is_file() and path.suffix == ".json":
            read_json(path)
    if run.recipe.backbone.trust_remote_code and not trust_remote_code:
        raise RunError(
            f"The run {folder} asks to run the Python in its backbone's repository ({run.backbone}); read that code, "
            "and give --trust-remote-code (trust_remote_code=True) if you trust it."
        )
    return run
