"""`buddy push` and `buddy pull`: a run as a folder of plain files, on the hub or on disk.

A run is shared as text, JSON and safetensors only: no pickle, no links, no code. The folder is a run folder that every
command accepts. A foreign folder is checked file by file before it is used.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from buddy.backbone import embedded
from buddy.backbone.adapter import FILES as ADAPTER_FILES
from buddy.backbone.load import is_local, locate, read_config
from buddy.config import flatten, to_yaml
from buddy.console import status, stdout
from buddy.errors import BackboneError, DamagedError, RunError, reason
from buddy.io import load_tensors, new_folder, read_json, write_json, write_text, writing
from buddy.run import Run, read_run
from buddy.run_files import (
    ADAPTER,
    BRIDGE,
    FACTS,
    INPUTS,
    METRICS,
    PREDICTOR,
    PREDICTOR_FACTS,
    RECIPE,
    ROUTER,
    checksums_of,
    read_metrics,
    update_checksums,
)

HUB = "hf://"  # marks a hub name that could be a folder too
CARD, CONFIG = "README.md", "config.json"
FILES = (  # no other files are copied, uploaded or downloaded
    *(RECIPE, FACTS, ROUTER, METRICS, INPUTS, BRIDGE, PREDICTOR, PREDICTOR_FACTS),
    *(f"{ADAPTER}/{name}" for name in ADAPTER_FILES),
    *(CONFIG, CARD),
)


def push(folder: Path, *, to: str, private: bool = False, licence: str | None = None) -> None:
    """Write a run's files, a config.json and a model card into a new folder or onto the hub.

    Args:
        folder: a finished run.
        to: `owner/name` on the hub, or a folder to make.
        private: make a new repository private.
        licence: of the router's weights, as the hub's identifier, such as "apache-2.0".

    Raises:
        RunError: the run cannot be read, or the target cannot be written.
    """
    name = hub_name(to)
    run = read_run(folder)
    if licence is not None and not licence.strip():
        raise RunError("The licence is empty; give an identifier such as apache-2.0, or leave it out.")
    if name is None:
        if private:
            raise RunError(f"--private is for the hub, and {to} is a folder; leave it out.")
        out = folder_of(to)
        with new_folder(out) as made:
            files = _write_shared(made, run, f"./{out.name}", licence)
        where = str(out)
    else:
        with tempfile.TemporaryDirectory(prefix="buddy-push-") as made, status(f"Uploading to {name} …"):
            files = _write_shared(Path(made), run, name, licence)
            where = _upload(Path(made), name, private=private)
    stdout.print(f"Pushed {run.router_name} for {run.backbone} to {where}: {', '.join(files)}")
    if local := _local_paths(run):
        stdout.print(f"Warning: the shared recipe contains local paths: {local}")
    source = name or to
    stdout.print(f"Use:  buddy pull {quote(source)} --out DIR, or in Python buddy.load({source!r})")


def pull(
    source: str,
    *,
    out: Path,
    revision: str | None = None,
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make a run folder from the output of `push`; its files are equal to the bit.

    Args:
        source: `owner/name` on the hub, or a folder.
        out: the run folder to make.
        revision: branch, tag or commit, on the hub only.
        backbone: replaces the backbone's name in its recipe, such as by a folder of this machine.
        trust_remote_code: allow a recipe that runs the Python of its backbone's repository.

    Raises:
        BackboneError: there is no such backbone, or no model in its folder.
        RunError: the source cannot be used, or `out` cannot be written. Nothing is left at `out` then.
    """
    config: dict[str, Any] = {}
    if backbone is not None and os.path.isdir(there := locate(backbone)):
        config = read_config(backbone, there)
        config = config.get("text_config") or config
        if embedded.find(backbone) is None:
            backbone = os.path.abspath(there)  # the run is used from other folders, too
    name = hub_name(source, revision)
    if name is None and not os.path.isdir(folder_of(source)):
        raise RunError(f"There is no folder {source}; check the path, or give owner/name for the hub.")
    with new_folder(out) as made:
        if name is None:
            _copy_files(read_run(folder_of(source)).folder, made)
        else:
            with status(f"Downloading {name} …"):
                download(name, revision, made)
            shutil.rmtree(made / ".cache", ignore_errors=True)  # of the hub's client
        run = check_run(made, shown_as=name or source.rstrip("/"), trust_remote_code=trust_remote_code)
        for key, ours in (("num_hidden_layers", "layers"), ("hidden_size", "hidden")):
            if config.get(key, run.geometry[ours]) != run.geometry[ours]:
                raise BackboneError(
                    f"{backbone} has {key}={config[key]}, and the run is for {run.geometry[ours]}; give --backbone the "
                    "model that the run was made with."
                )
        if backbone is not None:
            _rename_backbone(made, run, backbone)
    stdout.print(f"Pulled {run.router_name} for {backbone or run.backbone} into {out}")
    path = quote(str(out))
    stdout.print(f'Use: buddy generate --run {path} "…", or buddy evaluate --run {path}')


# Names: a folder or a repository on the hub


def hub_name(text: str, revision: str | None = None) -> str | None:
    """The repository `owner/name` for a text such as `hf://owner/name`; None for a folder.

    `hf://owner/name` is always on the hub; `owner/name` is where there is no local folder `owner`.

    Raises:
        RunError: it is empty, `hf://` without such a name, could be either, or is a folder with a revision.
    """
    if not text.strip():
        raise RunError(f"The name is empty; give a folder, such as ./shared, or {HUB}owner/name.")
    name = text.removeprefix(HUB)
    valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", name) and ".." not in name and "--" not in name
    if text.startswith(HUB):
        if not valid:
            raise RunError(f"{text} is no name on the hub; write {HUB}owner/name.")
        return name
    if not valid or os.path.isdir(text):
        if revision is not None:
            raise RunError(f"{text} is a folder and has no revisions; leave out revision {revision!r}.")
        return None
    if os.path.isdir(text.partition("/")[0]):
        raise RunError(f"{text} could be a folder or a name on the hub; write ./{text} or {HUB}{text}.")
    return text


def folder_of(text: str) -> Path:
    """The path of a folder's name, with `~` expanded."""
    return Path(os.path.expanduser(text))


# The hub


def _upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to the repository `owner/name`; returns its address. `FILES` that it lacks are removed there."""
    from huggingface_hub import HfApi

    client = HfApi()
    try:
        client.create_repo(name, private=private or None, exist_ok=True)
        public = private and not client.repo_info(name).private  # one that was there before
        if not public:
            client.upload_folder(
                repo_id=name, folder_path=str(folder), commit_message="Upload with Buddy", delete_patterns=list(FILES)
            )
    except Exception as error:  # no network, no token, no such owner: each has an error class of its own
        raise RunError(
            f"{name} cannot be written on the hub ({reason(error)}); log in with `hf auth login`."
        ) from error
    if public:
        raise RunError(f"{name} is public on the hub, so nothing was uploaded; name another, or leave --private out.")
    return f"https://huggingface.co/{name}"


def download(name: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """Download the files of a run from the repository `owner/name`; returns their folder.

    Args:
        name: of the repository.
        revision: branch, tag or commit.
        folder: where the files go; None for the hub's own cache.

    Raises:
        RunError: no such repository or revision, no network, or no right to read it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_dir=folder))
    except Exception as error:
        raise RunError(
            f"{name} cannot be read from the hub ({reason(error)}); check the name, or give a folder."
        ) from error


# Files


def check_run(folder: Path, *, shown_as: str, trust_remote_code: bool = False) -> Run:
    """The run in a foreign folder, after a check of every file.

    Args:
        folder: of the run.
        shown_as: the folder's name in errors.
        trust_remote_code: allow a recipe that runs the Python of its backbone's repository.

    Raises:
        RunError: a file is missing or damaged, or the recipe runs code.
    """
    try:
        run = read_run(folder)  # checks the sums of all files that are there
        for name in checksums_of(run.folder).keys() - {CONFIG, CARD}:
            if not (folder / name).is_file():
                raise DamagedError(folder / name, "it is missing")
        for path in filter(Path.is_file, (folder / name for name in FILES)):
            if path.suffix == ".safetensors":
                load_tensors(path)
            elif path.suffix == ".json":
                read_json(path)
        if run.recipe.backbone.trust_remote_code and not trust_remote_code:
            raise RunError(
                f"The run {folder} asks to run the Python in its backbone's repository ({run.backbone}); read that "
                "code, and give --trust-remote-code (trust_remote_code=True) if you trust it."
            )
    except RunError as error:
        raise RunError(str(error).replace(str(folder), shown_as)) from error
    return run


def with_backbone(run: Run, backbone: str) -> Run:
    """The run with its backbone under another name."""
    section = replace(run.recipe.backbone, name=backbone, revision=None)
    return replace(run, recipe=replace(run.recipe, backbone=section), backbone=backbone)


def _plain_files(folder: Path) -> list[str]:
    """Those of `FILES` that are in a folder; RunError where one is a link or not a file."""
    found = []
    for name in FILES:
        path = folder / name
        linked = path.is_symlink() or (path.parent != folder and path.parent.is_symlink())
        if linked or (path.exists() and not path.is_file()):
            raise RunError(f"{path} is not a plain file; put the file itself there.")
        if path.is_file():
            found.append(name)
    return found


def _copy_files(source: Path, target: Path) -> None:
    """Copy `FILES`, and no other files, into an empty folder."""
    for name in _plain_files(source):
        with writing(target):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _write_shared(made: Path, run: Run, name: str, licence: str | None) -> list[str]:
    """Fill an empty folder with a run's files, its config.json and its card; returns their names.

    The copy is checked, and not the run, which another process may replace meanwhile.
    """
    from buddy.hub.card import run_card  # with pandas, which loading a run does not need

    _copy_files(run.folder, made)
    run = check_run(made, shown_as=str(run.folder), trust_remote_code=True)
    _write_config(made, run)
    write_text(made / CARD, run_card(run, read_metrics(made), name, licence))
    return _plain_files(made)


def _write_config(folder: Path, run: Run) -> None:
    """Write config.json: the resolved recipe, versions and backbone for other programs."""
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


def _rename_backbone(made: Path, run: Run, backbone: str) -> None:
    renamed = with_backbone(run, backbone)
    write_text(made / RECIPE, to_yaml(renamed.recipe))
    if (made / CONFIG).is_file():
        _write_config(made, renamed)
    write_json(made / FACTS, read_json(made / FACTS) | {"backbone": backbone})
    update_checksums(made)


def _local_paths(run: Run) -> str:
    """The recipe's keys and values that are local paths."""
    path = r"(^|[\[, '])[/~.]|\.(txt|jsonl?|csv|parquet|ckpt)\b"
    values = {key: str(value) for key, value in flatten(run.recipe).items()}
    folders = ["backbone.name"] * is_local(values["backbone.name"])
    folders += ["data.source"] * os.path.isdir(os.path.expanduser(values["data.source"]))
    return ", ".join(f"{key} {value}" for key, value in values.items() if key in folders or re.search(path, value))
