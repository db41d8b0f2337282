"""The run folder `<output>/<recipe>/<router>/seed-N`: made, resumed, completed and read.

    recipe.yaml          the resolved recipe
    inputs.json          digests of the model, the texts and the router's code
    run.json             versions, seed, backbone, geometry, date, and the seconds of fitting so far
    checkpoints/         of training; an interrupted run resumes from last.ckpt
    router.safetensors   parameters and buffers of the router (never pickle)
    bridge.safetensors   of a run with bridges
    adapter/             of a healed run
    predictor.*          of the budget predictor, if there is one
    metrics.json         the results, and checksums of the files above

Every file is replaced atomically. `metrics.json` is written last: a run is complete exactly if it exists. A complete
run is never changed: a refit is built in a hidden sibling folder and swapped in once it is complete.
"""

import hashlib
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.config import load_recipe, to_yaml
from buddy.console import stderr
from buddy.errors import BuddyError, DamagedError, RunError, described, did_you_mean
from buddy.io import locked, read_json, remove_parts, write_json, write_text, writing
from buddy.provenance import CODE, UNKNOWN, differences
from buddy.run_files import (
    CHECKPOINTS,
    FACTS,
    FITTED,
    HEALING,
    INPUTS,
    LAST,
    METRICS,
    RECIPE,
    ROUTER,
    SUMS,
    TARGETS,
    check_files,
    read_facts,
    read_metrics,
    run_facts,
    write_metrics,
)
from buddy.schema import Recipe

if TYPE_CHECKING:
    from buddy.router import Geometry

LONGEST_LABEL = 248  # bytes in a folder's name; with a digest 255, which most systems allow

# Making


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: a router under a recipe with one seed.

    To make the run, hold `lock()`, write into the folder that `begin` returns, and call `complete`.
    """

    path: Path

    @classmethod
    def of(cls, folder: Path, label: str, seed: int) -> "RunFolder":
        """`<folder>/<router>/seed-N` in the folder of a comparison; `label` is the router with its overrides."""
        return cls(folder / label_folder(label) / f"seed-{seed}")

    @property
    def is_complete(self) -> bool:
        """Whether the run is finished and in its final folder."""
        return os.path.isfile(self.path / METRICS)  # os.path answers for names that are too long

    @property
    def work(self) -> Path:
        """The folder to write in: the final one, or a sibling while that holds a complete run."""
        return self._beside("new") if self.is_complete else self.path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The lock to hold while the run is made; it completes what a kill left half done.

        Raises:
            RunError: another process holds it, or the folder cannot be written.
        """
        busy = f"Another process is making {self.path}; wait for it or stop it first."
        with locked(self._beside("lock"), busy):
            self._swap()
            with writing(self.path):
                for folder in (self.path, self._beside("new")):
                    remove_parts(folder)
            yield

    def differences(self, recipe: Recipe, digests: Mapping[str, str], ignore: Sequence[str] = ()) -> list[str]:
        """How the run in the folder differs from a requested one; empty if it can be reused or resumed.

        Args:
            recipe: the requested one.
            digests: of its inputs, from `Session.digests`.
            ignore: prefixes of recipe keys that may differ, beside those of `buddy.provenance`.

        Returns:
            One phrase for each recipe key, input or damaged file, as in "optimizer.lr: 0.003 there, 0.006 here"; none
            if the folder holds no run.

        Raises:
            BuddyError: a newer Buddy made the run, or the recipe of an incomplete run cannot be read.
        """
        if not self.is_complete and not (self.path / RECIPE).exists():
            return []
        try:
            if self.is_complete:
                stored = read_run(self.path).recipe
                read_metrics(self.path)
            else:
                stored = load_recipe(self.path / RECIPE, saved=True)
        except DamagedError as error:
            return [f"{error.path.name} is damaged ({error.reason})"]
        return differences(stored, recipe, stored_digests(self.path), digests, ignore)

    def begin(
        self,
        recipe: Recipe,
        recipe_name: str,
        digests: Mapping[str, str],
        geometry: "Geometry",
        ignore: Sequence[str] = (),
    ) -> Path:
        """Start or resume the run; requires the lock.

        An incomplete run of the same recipe and inputs is kept, so that it resumes from its checkpoint. If
        `ckpt_path` names a checkpoint in the folder of another incomplete run, that checkpoint alone is kept. Any other
        incomplete run is removed. A complete run stays as it is.

        Args:
            recipe: of the run.
            recipe_name: stored in run.json.
            digests: of its inputs, from `Session.digests`.
            geometry: of router and model.
            ignore: as for `differences`.

        Returns:
            The folder to write in, `work`.

        Raises:
            BuddyError: something that is not a run is in the way, the recipe of an incomplete run cannot be read, or
                the folder cannot be written.
        """
        self.check_free()
        work = self.work
        if not RunFolder(work).differences(recipe, digests, ignore):
            warn_of_changed_code(work, digests)
            digests = {**digests, **{name: value for name, value in stored_digests(work).items() if name == CODE}}
        elif recipe.ckpt_path and Path(recipe.ckpt_path).resolve().is_relative_to(work.resolve()):
            _forget_progress(work / CHECKPOINTS, Path(recipe.ckpt_path))
        else:
            self._discard(work)
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        write_text(work / RECIPE, to_yaml(recipe))
        write_json(work / INPUTS, dict(digests))
        write_json(work / FACTS, run_facts(work, recipe, recipe_name, digests, geometry))
        return work

    def complete(self, metrics: Mapping[str, Any]) -> Path:
        """Write metrics.json with the checksums of the other files, and move the run to its final folder.

        A kill at any point leaves the old run or the new one.

        Raises:
            DamagedError: the router is missing.
            RunError: the folder cannot be written.
        """
        write_metrics(self.work, metrics)
        self._swap()
        return self.path

    def abandon(self) -> None:
        """Remove an incomplete run unless it has something to resume from."""
        work = self.work
        if work.exists() and not (work / METRICS).exists() and not (work / CHECKPOINTS).exists():
            self._discard(work)

    def _beside(self, ending: str) -> Path:
        """A hidden sibling: "new" is a refit in progress, "old" a run that is being replaced or deleted."""
        return self.path.with_name(f".{self.path.name}.{ending}")

    def check_free(self) -> None:
        """Raises RunError where something other than a run would be overwritten or hidden."""
        if (self.path.parent / FACTS).is_file():
            raise RunError(
                f"{self.path.parent} is a run of Buddy 0.1, but must hold one folder for each seed; move it or choose "
                "another output."
            )
        if self.path.exists() and not _is_run(self.path) and any(self.path.glob("[!.]*")):
            raise RunError(f"{self.path} exists and is not a run folder; move it or choose another output.")

    def _discard(self, folder: Path) -> None:
        """Delete a folder; renamed first, so that no half-deleted run is resumed after a kill."""
        with writing(folder):
            shutil.rmtree(folder.rename(self._beside("old")))

    def _swap(self) -> None:
        """Move a complete refit to the final folder; remove what it replaces, and what only an incomplete run needs.

        The checkpoint of healing is several times the adapter's size.
        """
        new, old = self._beside("new"), self._beside("old")
        with writing(self.path):
            if (new / METRICS).exists():
                if self.path.exists():
                    self.path.rename(old)
                new.rename(self.path)
            if self.is_complete:
                checkpoints = self.path / CHECKPOINTS
                (checkpoints / HEALING).unlink(missing_ok=True)
                for folder in (checkpoints / FITTED, self.path / TARGETS):
                    shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # the router's checkpoint stays
                    checkpoints.rmdir()
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class RunSpec:
    """One run to make or to reuse: a router under a recipe with one seed.

    Attributes:
        label: the router with its overrides, as tables name it.
        recipe: of the run.
        recipe_name: kept in run.json.
        folder: of the run.
        reuse_from: a complete run whose router is taken, so that only adapter and bridges are trained.
        ignored_keys: beginnings of recipe keys that may differ in a run that is reused, whatever its router.
    """

    label: str
    recipe: Recipe
    recipe_name: str
    folder: Path
    reuse_from: Path | None = None
    ignored_keys: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.label}, seed {self.recipe.seed}"

    @property
    def run_folder(self) -> RunFolder:
        """Begins, resumes and completes the run."""
        return RunFolder(self.folder)

    @property
    def log(self) -> Path:
        """The file that a worker's output and unexpected errors go to."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def unexpected(self, error: Exception) -> RunError:
        """The error to show for one that a router, or another part of the user's code, raised; its traceback is logged.

        Call it while that error is handled.
        """
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as log:  # a worker writes to it, too
                log.write(traceback.format_exc())
        return RunError(f"{described(error)}; the traceback is in {self.log}.")


def _forget_progress(checkpoints: Path, kept: Path) -> None:
    """Remove what a run resumes from, except the checkpoint `kept`, which the training of its router starts from."""
    for path in (checkpoints / LAST, checkpoints / HEALING):
        if path.exists() and not kept.samefile(path):
            path.unlink()
    shutil.rmtree(checkpoints / FITTED, ignore_errors=True)


def code_changed(folder: Path, digest: str) -> bool:
    """Whether the router's code, of this `code_digest` now, changed since the run in the folder began."""
    stored = stored_digests(folder).get(CODE, UNKNOWN)
    return UNKNOWN not in (stored, digest) and stored != digest


def warn_of_changed_code(folder: Path, digests: Mapping[str, str]) -> None:
    """Print a warning if the router's code changed since the run in the folder began."""
    if code_changed(folder, digests.get(CODE, UNKNOWN)):
        stderr.print(f"Warning: the code of the router changed since {folder} began; delete that folder to fit again.")


def label_folder(label: str) -> str:
    """A router's label as a file name, with a digest where its overrides are long or contain other characters."""
    name, bracket, overrides = label.partition("[")
    if not bracket:
        return folder_name(name)
    spelt = f"{name}_{overrides.replace(';', ',').removesuffix(']')}"
    plain = re.sub(r"[^\w.=,-]+", "-", spelt).strip(".")
    cut = plain.encode()[:LONGEST_LABEL].decode(errors="ignore")
    return cut if cut == spelt else f"{cut}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def folder_name(name: str) -> str:
    """A name with hyphens for characters that do not belong in a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".") or "-"


# Reading


@dataclass(frozen=True)
class Run:
    """A complete run. `geometry` has the fields of `router.Geometry`, `versions` the versions of packages by name."""

    folder: Path
    recipe_name: str
    recipe: Recipe
    router_name: str
    backbone: str
    fingerprint: str
    geometry: dict[str, int]
    versions: dict[str, str]

    @property
    def inputs(self) -> list[str | Path]:
        """The folder, the model and the recipe's texts, which a command that reads the run must not overwrite."""
        return [self.folder, *recipe_inputs(self.recipe)]


def recipe_inputs(recipe: Recipe) -> list[str]:
    """The model and the texts of a recipe: names, files or folders."""
    data = recipe.data
    return [recipe.backbone.name, data.source, *data.train_sources, *data.calibration_sources]


def read_run(folder: str | Path) -> Run:
    """A complete run without its tensors (`load_router`) and results (`read_metrics`).

    Args:
        folder: of the run, or `<output>/<recipe>/<router>` if that holds the run of one seed.

    Raises:
        RunError: the folder or a file in it is missing or damaged, the run is not complete, or a newer Buddy made it.
    """
    found = _resolve(Path(folder))
    facts = read_facts(found)
    check_files(found)
    try:
        recipe = load_recipe(found / RECIPE, saved=True)
    except BuddyError as error:
        raise DamagedError(found / RECIPE, str(error).rstrip(".")) from error
    return Run(folder=found, recipe=recipe, **facts)


def check_backbone(run: Run, fingerprint: str, details: str) -> None:
    """Raises RunError when the run was made with another backbone than the one with this fingerprint and `details`."""
    if run.fingerprint != fingerprint:
        raise RunError(
            f"{run.folder} was made with other weights than {run.backbone} has (fingerprint {run.fingerprint}, not "
            f"{fingerprint}); name the backbone that it was made with, or make the run again with `buddy fit`."
        )
    stored = stored_digests(run.folder).get("details")
    if details and stored not in (None, details):
        raise RunError(
            f"{run.folder} was made with another configuration of {run.backbone}, or other weights; name the backbone "
            "that it was made with, or make the run again with `buddy fit`."
        )


def complete_seeds(folder: Path) -> list[int]:
    """The seeds of the complete runs in the folder of one router, in order."""
    names = (path.parent.name.removeprefix("seed-") for path in folder.glob(f"seed-*/{METRICS}"))
    return sorted(int(name) for name in names if name.isdecimal())


def _is_run(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in (FACTS, RECIPE))


def _resolve(folder: Path) -> Path:
    """The folder of a complete run, given that folder or the one above it."""
    if not os.path.isdir(folder):  # os.path answers for names that are too long
        hint = did_you_mean(folder.name, _runs_in(folder.parent))
        raise RunError(f"There is no run folder {folder}{hint or '; make it with `buddy fit --recipe NAME`.'}")
    if not _is_run(folder):
        seeds = [*folder.glob(f"seed-*/{METRICS}")] or [*folder.glob(f"seed-*/{RECIPE}")]
        if len(seeds) == 1:
            return _resolve(seeds[0].parent)
        below = _runs_in(folder)
        holds = f" but holds the runs {', '.join(below)}; name one of them" if below else ""
        raise RunError(f"{folder} is not a run folder{holds or '; name one, such as runs/quickstart/buddy'}.")
    missing = [name for name in (RECIPE, FACTS, ROUTER) if not (folder / name).is_file()]
    if not RunFolder(folder).is_complete and (missing or SUMS not in read_json(folder / FACTS)):
        raise RunError(f"The run {folder} is unfinished: {METRICS} is missing; repeat its `buddy fit` to resume.")
    if missing:
        raise DamagedError(folder / missing[0], "it is missing")
    return folder


def _runs_in(folder: Path) -> list[str]:
    """Names of runs, and of folders with runs, in a folder."""
    found = (*folder.glob(f"[!.]*/{FACTS}"), *folder.glob(f"[!.]*/seed-*/{FACTS}"))
    return sorted({path.relative_to(folder).parts[0] for path in found})


def stored_digests(folder: Path) -> dict[str, str]:
    """The digests in inputs.json; none where the file is missing."""
    try:
        return read_json(folder / INPUTS)
    except BuddyError:
        return {}
