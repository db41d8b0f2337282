"""`buddy push` and `buddy pull`: runs as folders of plain files, on the hub or on disk."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote

from buddy.backbone.adapter import FILES as ADAPTER_FILES
from buddy.config import to_yaml
from buddy.console import results, status
from buddy.errors import DamagedError, RunError, reason
from buddy.hub.card import is_local, run_card
from buddy.io import alive, checksum, load_tensors, read_json, write_json, write_text, writing
from buddy.run import (
    ADAPTER,
    FACTS,
    INPUTS,
    METRICS,
    PREDICTOR,
    PREDICTOR_FACTS,
    RECIPE,
    ROUTER,
    Run,
    read_metrics,
    read_run,
)


def check_new(out: Path) -> None:
    """Raises RunError when no folder can be made at `out`: something is there, or the place for it is missing."""
    out = out.absolute()
    if os.path.lexists(out):  # os.path, unlike Path, answers for any text: a name of 300 letters, say
        raise RunError(f"{out} exists and is not overwritten; name a new folder.")
    if not os.path.isdir(out.parent):
        raise RunError(f"There is no folder {out.parent} for {out.name}; make it first.")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled in the block. It becomes `out` when the block ends well, or else goes away.

    What a killed process left there is removed by the next call.

    Raises:
        RunError: `out` exists, before the block or after it, or its place cannot be written.
    """
    out = out.absolute()
    check_new(out)
    beside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with writing(out):
        for leftover in _leftovers(out):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
    try:
        yield beside
        check_new(out)  # another process may have been quicker
        with writing(out):
            beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _leftovers(out: Path) -> list[Path]:
    """Folders of processes that are gone, and of this one's earlier calls."""
    name = re.compile(rf"\.{re.escape(out.name)}\.partial-(\d+)")
    found = [(path, name.fullmatch(path.name)) for path in out.parent.iterdir()]
    return [path for path, match in found if match and (int(match[1]) == os.getpid() or not alive(int(match[1])))]


HUB = "hf://"  # before a name, where it could be a folder too
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")


def hub_name(text: str) -> str | None:
    """The hub's `owner/name` that a text stands for; None where it stands for a folder.

    `hf://owner/name` is the hub's whatever lies here; `owner/name` is where no folder `owner` does.

    Raises:
        RunError: it is empty, `hf://` without such a name, or could be either.
    """
    if not text.strip():
        raise RunError(f"The name is empty; give a folder, such as ./shared, or {HUB}owner/name.")
    if text.startswith(HUB):
        name = text.removeprefix(HUB)
        if not _is_name(name):
            raise RunError(f"{text} is no name on the hub; write {HUB}owner/name.")
        return name
    if not _is_name(text) or os.path.isdir(text):
        return None
    if os.path.isdir(text.partition("/")[0]):
        raise RunError(f"{text} could be a folder or a name on the hub; write ./{text} or {HUB}{text}.")
    return text


def folder_of(text: str) -> Path:
    """The folder that a text which is no name on the hub stands for."""
    return Path(os.path.expanduser(text))


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


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
        RunError: a file is missing, damaged, or names what lies outside; or the recipe asks for code.
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


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Put a folder's files into the hub's repository `owner/name`, made where it is missing; its address.

    Files of an earlier run that this one lacks, an adapter say, go away there; what is no file of a run stays.

    Raises:
        RunError: no token, no network, or no right to write there.
    """
    from huggingface_hub import HfApi

    client = HfApi()
    try:
        client.create_repo(name, private=private or None, exist_ok=True)
        client.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload with Buddy", delete_patterns=list(FILES)
        )
    except Exception as error:  # no network, no token, no such owner, … each has its own error, all the user's
        raise _refused(f"{name} cannot be written on the hub", error, "log in with `hf auth login`") from error
    return f"https://huggingface.co/{name}"


def download(name: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """The folder with the files of a run, of the hub's repository `owner/name`.

    Args:
        name: of the repository.
        revision: branch, tag or commit.
        folder: where they go; None for the hub's own cache.

    Raises:
        RunError: no such repository or revision, no network, or no right to read it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_dir=folder))
    except Exception as error:
        raise _refused(f"{name} cannot be read from the hub", error, "check the name, or give a folder") from error


def _refused(what: str, error: Exception, advice: str) -> RunError:
    return RunError(f"{what} ({reason(error)}); {advice}.")


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
        RunError: there is no run, it is DamagedError, or asks for what is not allowed.
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
