"""The run folder `<output>/<recipe>/<router>/seed-N`: made, resumed, completed and read.

    recipe.yaml          the resolved recipe
    inputs.json          digests of the model, the texts and the router's code
    run.json             versions, seed, backbone, geometry, date, and the seconds of fitting so far
    checkpoints/         of training; last.ckpt is what an interrupted run resumes from
    router.safetensors   parameters and buffers of the router (never pickle)
    adapter/             of a healed run
    predictor.*          of the budget predictor, where there is one
    metrics.json         the results, and checksums of the files above

Three invariants make the rest simple. Every file is replaced atomically. `metrics.json` is written last, so a run is
complete exactly when it is there. A complete run is never changed: it is made again in a hidden sibling folder, which
takes its place once it is complete.
"""

import ast
import hashlib
import inspect
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

import buddy
from buddy.config import flatten, load_recipe, to_yaml
from buddy.console import errors
from buddy.errors import BuddyError, DamagedError, RunError, nearest
from buddy.io import (
    checksum,
    load_tensors,
    read_json,
    remove_parts,
    save_tensors,
    write_json,
    write_text,
    write_with_checksum,
    writing,
)
from buddy.registry import load
from buddy.schema import Recipe
from buddy.values import flaw, shown

if TYPE_CHECKING:
    from torch import Tensor

    from buddy.router import Geometry

RECIPE, FACTS, INPUTS = "recipe.yaml", "run.json", "inputs.json"
ROUTER, METRICS = "router.safetensors", "metrics.json"
ADAPTER = "adapter"  # the folder of a healed run's adapter
PREDICTOR, PREDICTOR_FACTS = "predictor.safetensors", "predictor.json"
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
FORMAT = 2  # of a run folder; 1 is that of Buddy 0.1, which kept the checksums in run.json
SUMS = "checksums"  # the key of the checksums in metrics.json
CODE = "router's code"  # the digest in inputs.json whose change only warns
SAVE_EVERY = 5.0  # seconds between two writes of the time spent

CKPT_KEYS = ("ckpt_path",)
# Keys of a recipe that change nothing in the run.
FREE_KEYS = (*("output", "rivals", "checkpoint_every", "logger", "trainer.log_every_n_steps"),)


# Making


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: a router under a recipe with one seed.

    Whoever makes the run holds `lock()`, writes into the folder that `begin` returns, and ends with `complete`.
    """

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, recipe_name: str, label: str | None = None) -> "RunFolder":
        """`<output>/<recipe>/<router>/seed-N`; characters that do not belong in a file name become hyphens.

        Args:
            label: of a rival with overrides, in place of the router's name.
        """
        names = folder_name(recipe_name), label_folder(label or recipe.router.name), f"seed-{recipe.seed}"
        return cls(Path(recipe.output).joinpath(*names))

    @property
    def is_complete(self) -> bool:
        """Whether the run is finished and in its place."""
        return _is_complete(self.path)

    @property
    def work(self) -> Path:
        """Where the run is made: in its place, or in a sibling while a complete run is there."""
        return self._new if self.is_complete else self.path

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that an interrupted run resumes from, whether it exists or not."""
        return self.work / CHECKPOINTS / LAST

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the run is made; the system frees it when the process ends, however that happens.

        Raises:
            RunError: another process holds it, or the folder cannot be written.
        """
        lock = FileLock(self._beside("lock"))
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"Another process is making {self.path}; wait for it or stop it first.") from None
        try:
            self._swap()
            with writing(self.path):
                remove_parts(self.path)
            yield
        finally:
            lock.release()

    def differences(self, recipe: Recipe, digests: Mapping[str, str], ignore: Sequence[str] = ()) -> list[str]:
        """Why the run in the folder, complete or begun, is not the one that is asked for; empty where there is none.

        Keys in `FREE_KEYS` and the digest of the router's code may differ (see `warn_of_changed_code`).

        Args:
            recipe: the one asked for.
            digests: of its inputs, as `input_digests` gives them.
            ignore: beginnings of more recipe keys that may differ.

        Returns:
            One phrase for each recipe key, input or damaged file, as in "optimizer.lr: 0.003 there, 0.006 here".
        """
        exists = self.is_complete or (self.path / RECIPE).exists()
        return _differences(self.path, recipe, digests, ignore) if exists else []

    def warn_of_changed_code(self, digests: Mapping[str, str]) -> None:
        """Print a warning where the router's code is not the code that the run in the folder was made with."""
        _warn_of_changed_code(self.path, digests)

    def begin(self, recipe: Recipe, recipe_name: str, digests: Mapping[str, str], geometry: "Geometry") -> Path:
        """Begin or resume the run; call it with the lock held.

        An incomplete run of the same recipe and inputs is kept, so that it resumes from its checkpoint; so is one that
        the recipe's `ckpt_path` points into. Any other incomplete run is removed. A complete run stays as it is.

        Args:
            recipe: of the run.
            recipe_name: is kept in run.json.
            digests: of its inputs, as `input_digests` gives them.
            geometry: of router and model.

        Returns:
            The folder to write in, `work`.

        Raises:
            RunError: something that is not a run is in the way, or the folder cannot be written.
        """
        self._check_free()
        work = self.work
        if work.exists():
            if _resumes(work, recipe, digests):
                _warn_of_changed_code(work, digests)
            else:
                self._discard(work)
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
            remove_parts(work)
        write_text(work / RECIPE, to_yaml(recipe))
        write_json(work / INPUTS, dict(digests))
        write_json(work / FACTS, _facts(work, recipe, recipe_name, digests, geometry))
        return work

    def complete(self, metrics: Mapping[str, Any]) -> Path:
        """Write metrics.json with the checksums of the other files, and put the run in its place.

        A kill at any point leaves the old run or the new one.

        Raises:
            DamagedError: the router is missing.
            RunError: the folder cannot be written.
        """
        write_metrics(self.work, metrics)
        self._swap()
        return self.path

    def abandon(self) -> None:
        """Remove an incomplete run from which nothing could resume; one with a checkpoint stays."""
        work = self.work
        if work.exists() and not _is_complete(work) and not any(work.rglob("*.ckpt")):
            self._discard(work)

    def recover(self) -> None:
        """Undo what a kill left between the two renames of `complete`, so that the run can be read."""
        if not os.path.isdir(self.path) and os.path.isdir(self._old):
            with self.lock():
                pass

    @property
    def _new(self) -> Path:
        return self._beside("new")

    @property
    def _old(self) -> Path:
        """The old run for the moment in which the new one takes its place, or what is about to be deleted."""
        return self._beside("old")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{ending}")

    def _check_free(self) -> None:
        """Raises RunError where something that is not a run would be overwritten or hidden."""
        if (self.path.parent / FACTS).is_file():
            raise RunError(
                f"{self.path.parent} is a run of Buddy 0.1, where folders for each seed go now; move it or choose "
                "another output."
            )
        for folder in (self.path, self._new):
            if not folder.exists():
                continue
            if not folder.is_dir():
                raise RunError(f"{folder} is in the way and is not a folder; move it or choose another output.")
            is_run = (folder / RECIPE).exists() or (folder / FACTS).exists()
            if not is_run and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise RunError(f"{folder} is in the way and is not a run folder; move it or choose another output.")

    def _discard(self, folder: Path) -> None:
        """Delete a folder; the rename first, so that a kill leaves nothing to resume from by mistake."""
        with writing(folder):
            shutil.rmtree(self._old, ignore_errors=True)
            folder.rename(self._old)
            shutil.rmtree(self._old)

    def _swap(self) -> None:
        """Put a complete sibling in the place of the run, and finish what a kill interrupted before."""
        with writing(self.path):
            if _is_complete(self._new):
                if self.path.exists():
                    shutil.rmtree(self._old, ignore_errors=True)
                    self.path.rename(self._old)
                self._new.rename(self.path)
            elif not self.path.exists() and _is_complete(self._old):
                self._old.rename(self.path)
        shutil.rmtree(self._old, ignore_errors=True)


class Stopwatch:
    """Seconds spent on a run over all its sessions, kept in its run.json.

    It runs from its making. A kill costs at most the seconds since the last save.

    Args:
        folder: of the run, as `RunFolder.begin` returns it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FACTS
        self._before = _seconds_in(folder)
        self._start = self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far, those of earlier sessions included."""
        return self._before + time.perf_counter() - self._start

    def tick(self) -> None:
        """Save the seconds if the last time is a while ago."""
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Save the seconds in run.json."""
        self._saved = time.perf_counter()
        write_json(self._path, read_json(self._path) | {"seconds": self.seconds})


def input_digests(router: str, model: str, text: str, training_text: str = "") -> dict[str, str]:
    """Digests of everything that a run is made from beside its recipe, by what they are of.

    Args:
        router: name of the router, whose code is read.
        model: fingerprint of the backbone.
        text: fingerprint of the recipe's text.
        training_text: fingerprint of the further texts that it is trained on; empty for none.
    """
    digests = {"model": model, "text": text, CODE: code_digest(load(router))}
    return digests | ({"training text": training_text} if training_text else {})


def code_digest(router: type) -> str:
    """Digest of what the file of a class does: comments, docstrings and layout do not count."""
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(router)))
    except (OSError, TypeError):  # made in a notebook, say
        return "unknown"
    return hashlib.sha256(ast.unparse(_Undocumented().visit(tree)).encode()).hexdigest()[:16]


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, which completes a run, with the checksums of the other files in the folder."""
    optional = [name for name in (INPUTS, PREDICTOR, PREDICTOR_FACTS) if (folder / name).exists()]
    adapter = sorted(f"{ADAPTER}/{path.name}" for path in (folder / ADAPTER).glob("[!.]*"))
    sums = {name: checksum(folder / name) for name in (RECIPE, FACTS, ROUTER, *optional, *adapter)}
    write_with_checksum(folder / METRICS, {**metrics, SUMS: sums})


def update_checksums(folder: Path) -> None:
    """Write the checksums of a complete run anew, after one of its files was changed on purpose."""
    facts = read_json(folder / FACTS)
    if not (folder / METRICS).exists():  # of Buddy 0.1, handed on without its results
        write_json(folder / FACTS, facts | {SUMS: {name: checksum(folder / name) for name in facts.get(SUMS, ())}})
        return
    if facts.pop(SUMS, None) is not None:
        write_json(folder / FACTS, facts)
    write_metrics(folder, read_metrics(folder))


def save_router(folder: Path, state: Mapping[str, "Tensor"]) -> None:
    """Write router.safetensors from a router's state dict: the same bytes for the same numbers."""
    save_tensors(folder / ROUTER, state, {"format": "pt"})  # of two keys safetensors would not keep the order


def label_folder(label: str) -> str:
    """A router's label as a file name; if its overrides lose characters, a digest keeps two labels apart."""
    name, bracket, overrides = label.partition("[")
    if not bracket:
        return folder_name(name)
    spelt = f"{name}_{overrides.replace(';', ',').removesuffix(']')}"
    plain = re.sub(r"[^\w.=,-]+", "-", spelt).strip(".")
    return plain if plain == spelt else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def folder_name(name: str) -> str:
    """A name with hyphens for what does not belong in a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".") or "-"


# Reading


@dataclass(frozen=True)
class Run:
    """A complete run as read. `geometry` has the fields of `router.Geometry`, `versions` those of the software."""

    folder: Path
    recipe_name: str
    recipe: Recipe
    router_name: str
    backbone: str
    fingerprint: str
    geometry: dict[str, int]
    versions: dict[str, str]
    created: str


def read_run(folder: str | Path) -> Run:
    """Everything of a complete run but its tensors (`load_router`) and results (`read_metrics`).

    Args:
        folder: of the run, or `<output>/<recipe>/<router>` where that holds the run of one seed only.

    Raises:
        RunError: the folder or a file in it is missing or damaged, the run is not complete, or a newer Buddy made it.
    """
    try:
        found = _resolve(Path(folder))
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise RunError(
            f"The run folder {folder} cannot be read ({error.strerror or error}); check the path."
        ) from error
    facts = _read_facts(found)
    _check_sums(found)
    try:
        recipe = load_recipe(found / RECIPE, saved=True)
    except BuddyError as error:
        raise DamagedError(found / RECIPE, str(error).rstrip(".")) from error
    return Run(folder=found, recipe=recipe, **facts)


def load_router(folder: Path) -> dict[str, "Tensor"]:
    """The state dict in router.safetensors; DamagedError where it is missing or damaged."""
    return load_tensors(folder / ROUTER)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The results in metrics.json; DamagedError where they are missing or damaged."""
    metrics = read_json(folder / METRICS)
    metrics.pop(SUMS, None)
    return metrics


def checksums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a complete run, by their names within its folder, as they were written down.

    Raises:
        DamagedError: they are missing, or one is of a file that does not lie in the folder.
    """
    legacy = _legacy_sums(folder)
    path = folder / (METRICS if legacy is None else FACTS)
    sums = read_json(path).get(SUMS) if legacy is None else legacy
    if not isinstance(sums, dict) or not all(map(_lies_within, sums)):
        raise DamagedError(path, "checksums is missing or wrong")
    return sums


def check_backbone(run: Run, fingerprint: str) -> None:
    """Raises RunError when the run was made with another backbone than the one with this fingerprint."""
    if run.fingerprint != fingerprint:
        raise RunError(
            f"{run.folder} was made with another backbone ({run.backbone}, fingerprint {run.fingerprint}, not "
            f"{fingerprint}); load that one or make the run again with `buddy fit`."
        )


def complete_seeds(folder: Path) -> list[int]:
    """The seeds of the complete runs in the folder of one router, in order."""
    names = (path.parent.name.removeprefix("seed-") for path in folder.glob(f"seed-*/{METRICS}"))
    return sorted(int(name) for name in names if name.isdecimal())


_TEXTS = ("recipe_name", "router_name", "backbone", "fingerprint", "created")
_MAPPINGS = ("geometry", "versions")


def _is_complete(folder: Path) -> bool:
    return os.path.isfile(folder / METRICS)  # os.path answers for names that are too long


def _resolve(folder: Path) -> Path:
    """The folder of a complete run, given that folder or the one above it."""
    RunFolder(Path(os.path.realpath(folder))).recover()
    if not folder.is_dir():
        hint = nearest(folder.name, _runs_in(folder.parent))
        raise RunError(f"There is no run folder {folder}{hint or '; make it with `buddy fit --recipe NAME`.'}")
    if not (folder / FACTS).exists() and not (folder / RECIPE).exists():
        for left in folder.glob(".seed-*.old"):
            RunFolder(folder / left.name.removeprefix(".").removesuffix(".old")).recover()
        seeds, below = complete_seeds(folder), _runs_in(folder)
        if len(seeds) == 1:
            return folder / f"seed-{seeds[0]}"
        if seeds:
            names = ", ".join(f"seed-{seed}" for seed in seeds)
            raise RunError(f"{folder} holds the runs {names}; name one of them, such as {folder}/seed-{seeds[0]}.")
        if any(folder.glob(f"seed-*/{RECIPE}")):
            raise _unfinished(folder)
        if below:
            raise RunError(f"{folder} is not a run but holds the runs {', '.join(below)}; name one of them.")
        raise RunError(f"{folder} is not a run folder; name one, such as runs/quickstart/buddy.")
    missing = [name for name in (RECIPE, FACTS, ROUTER) if not (folder / name).is_file()]
    if not _is_complete(folder) and (missing or _legacy_sums(folder) is None):
        raise _unfinished(folder)
    if missing:
        raise RunError(f"The run {folder} is half-written: {missing[0]} is missing; make it again with `buddy fit`.")
    return folder


def _unfinished(folder: Path) -> RunError:
    return RunError(
        f"The run {folder} is unfinished: {METRICS} is missing; go on with the same `buddy fit` that began it."
    )


def _runs_in(folder: Path) -> list[str]:
    """Names of runs, and of folders of runs, in a folder."""
    found = (*folder.glob(f"[!.]*/{FACTS}"), *folder.glob(f"[!.]*/seed-*/{FACTS}"))
    return sorted({path.relative_to(folder).parts[0] for path in found})


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    facts = read_json(path)
    made = facts.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{folder} was made by a newer Buddy (run format {made}); upgrade Buddy to read it.")
    kinds = {"format": int, **dict.fromkeys(_TEXTS, str), **dict.fromkeys(_MAPPINGS, dict)}
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind) or flaw(facts[name]):
            raise DamagedError(path, f"{name} is missing or wrong")
    return {name: facts[name] for name in (*_TEXTS, *_MAPPINGS)}


def _check_sums(folder: Path) -> None:
    """Raises DamagedError for a file of a run that is not what was written."""
    for name, written in checksums_of(folder).items():
        there = name in (RECIPE, ROUTER) or os.path.lexists(folder / name)  # the others need not be handed on
        if there and checksum(folder / name) != written:
            raise DamagedError(folder / name, "it is not what was written")


def _legacy_sums(folder: Path) -> Any:
    """The checksums of a run of Buddy 0.1; None for later ones."""
    try:
        return read_json(folder / FACTS).get(SUMS)
    except DamagedError:
        return None


def _lies_within(name: str) -> bool:
    """Whether the name of a file leads nowhere out of its folder."""
    path = PurePath(name)
    return not flaw(name) and not path.is_absolute() and ".." not in path.parts


# Comparing and beginning


def _differences(folder: Path, recipe: Recipe, digests: Mapping[str, str], ignore: Sequence[str] = ()) -> list[str]:
    try:
        if _is_complete(folder):
            stored = read_run(folder).recipe
            read_metrics(folder)
        else:
            stored = load_recipe(folder / RECIPE, saved=True)
    except DamagedError as error:
        return [f"{error.path.name} is damaged ({error.reason})"]
    except BuddyError as error:
        return [str(error).rstrip(".")]
    there, here = flatten(stored), flatten(recipe)
    keys = [key for key in dict.fromkeys([*there, *here]) if not key.startswith((*FREE_KEYS, *ignore))]
    # A checkpoint that was once begun from need not be named again.
    keys = [key for key in keys if key not in CKPT_KEYS or here.get(key) not in (None, "null", there.get(key))]
    found = [
        f"{key}: {_spelt(there, key)} there, {_spelt(here, key)} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]
    inputs = _inputs_in(folder)  # empty where they are not known
    names = [name for name in dict.fromkeys([*inputs, *digests]) if inputs and name != CODE]
    return found + [f"another {name}" for name in names if inputs.get(name) != digests.get(name)]


def _spelt(flat: Mapping[str, object], key: str) -> str:
    return shown(flat[key]) if key in flat else "not set"


def _inputs_in(folder: Path) -> dict[str, str]:
    """The digests in inputs.json; none where the file is missing."""
    try:
        return read_json(folder / INPUTS)
    except BuddyError:
        return {}


def _resumes(folder: Path, recipe: Recipe, digests: Mapping[str, str]) -> bool:
    """Whether an incomplete run is to be gone on with.

    Raises:
        RunError: it holds a checkpoint, and its recipe cannot be read; so nobody knows what would be deleted.
    """
    checkpoint = recipe.ckpt_path
    if checkpoint and Path(os.path.realpath(checkpoint)).is_relative_to(os.path.realpath(folder)):
        return True
    try:
        load_recipe(folder / RECIPE, saved=True)
    except BuddyError as error:
        if any(folder.rglob("*.ckpt")):
            reason = " ".join(str(error).split()).rstrip(".")
            raise RunError(
                f"{folder} holds a checkpoint, and its recipe cannot be read ({reason}); delete that folder to begin "
                "anew, or name the checkpoint as ckpt_path."
            ) from error
        return False
    return not _differences(folder, recipe, digests)


def _warn_of_changed_code(folder: Path, digests: Mapping[str, str]) -> None:
    stored = _inputs_in(folder).get(CODE)
    if stored is not None and stored != digests.get(CODE):
        errors.print(
            f"Warning: the code of the router changed since {folder} was begun; delete that folder to fit the router "
            "anew.",
            soft_wrap=True,
        )


def _facts(
    folder: Path, recipe: Recipe, recipe_name: str, digests: Mapping[str, str], geometry: "Geometry"
) -> dict[str, Any]:
    """What run.json holds: all that is needed to use the run again and to tell how it came about."""
    versions = {"python": platform.python_version(), "buddy": buddy.__version__}
    versions |= {name: version(name) for name in ("torch", "lightning", "transformers")}
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe_name": recipe_name,
        "router_name": recipe.router.name,
        "seed": recipe.seed,
        "backbone": recipe.backbone.name,
        "fingerprint": digests["model"],
        "geometry": asdict(geometry),
        "versions": versions,
        "seconds": _seconds_in(folder),
    }


def _seconds_in(folder: Path) -> float:
    """The seconds of earlier sessions; 0 where there were none, or where they cannot be read."""
    try:
        seconds = read_json(folder / FACTS)["seconds"]
    except (DamagedError, KeyError):
        return 0.0
    return float(seconds) if isinstance(seconds, int | float) else 0.0


class _Undocumented(ast.NodeTransformer):
    """Leaves out strings that stand alone: docstrings, and whatever else does nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node
