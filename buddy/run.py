"""Run folders: written by `buddy fit`, read by `buddy evaluate` and `buddy generate`.

A run is kept in `<output>/<recipe>/<router>/`. While it is made it lives in `<output>/<recipe>/.<router>.partial/`;
an interrupted one goes on from there.

recipe.yaml is the resolved recipe; run.json has versions, seed, backbone, geometry and dates; inputs.json has digests
of what the run was made of beside the recipe; router.safetensors
has the router's parameters and buffers (never pickle); metrics.json has the results. Checkpoints and the files of
TensorBoard lie beside them.
"""

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

import buddy
from buddy.config import Recipe, load_recipe, storable, to_yaml
from buddy.errors import BuddyError, DamagedError, RunError, nearest
from buddy.io import checksum, load_tensors, read_json, remove_parts, save_tensors, write_json, write_text, writing

if TYPE_CHECKING:
    from torch import Tensor

    from buddy.router import Geometry

RECIPE, FACTS, ROUTER, METRICS = "recipe.yaml", "run.json", "router.safetensors", "metrics.json"
INPUTS = "inputs.json"
ADAPTER = "adapter"  # the folder of a healed run's adapter
PREDICTOR, PREDICTOR_FACTS = "predictor.safetensors", "predictor.json"  # of the budget predictor, where there is one
PATIENCE = 1.0  # seconds for a process that has just taken a lock to say who it is
FORMAT = 1
_TEXTS = ("recipe_name", "router_name", "backbone", "fingerprint", "created", "status")
_MAPPINGS = ("geometry", "versions")


@dataclass(frozen=True)
class RunPlace:
    """Where the run of one router under one recipe is kept, and the steps by which it gets there."""

    final: Path

    @classmethod
    def of(cls, recipe: Recipe, recipe_name: str) -> "RunPlace":
        """`<output>/<recipe>/<router>`; signs that do not belong in a folder's name become hyphens."""
        return cls(Path(recipe.output) / folder_name(recipe_name) / folder_name(recipe.router.name))

    @property
    def partial(self) -> Path:
        """The folder in which the run is made."""
        return self._beside("partial")

    @property
    def aside(self) -> Path:
        """The old run, for the moment in which the new one takes its place."""
        return self._beside("old")

    @property
    def discarded(self) -> Path:
        """What was begun and is not gone on with, for the moment in which it is deleted."""
        return self._beside("discarded")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a run is made, so that two processes never write the same one; a kill frees it.

        Raises:
            RunError: another process holds it, or the place cannot be written.
        """
        lock, pid_file = FileLock(self._beside("lock")), self._beside("pid")
        with writing(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"Process {_holder(pid_file)} is making {self.final}; wait for it or stop it first."
                ) from None
        try:
            with writing(self.final):
                pid_file.write_text(str(os.getpid()))
            yield
        finally:
            with suppress(OSError):
                pid_file.unlink(missing_ok=True)
            lock.release()

    def open_partial(self, recipe: Recipe, inputs: Mapping[str, str] | None = None) -> Path:
        """The partial folder with recipe.yaml and inputs.json in it; call it with the lock held.

        What an interrupted run left there is kept when it was made of the same inputs and its recipe is the same but
        for `trainer.ckpt_path`, or that path points into it; otherwise the folder starts empty. What a killed process
        was writing there is removed.

        Args:
            recipe: of the run.
            inputs: digests of what it is made of beside the recipe, by what they are of.

        Raises:
            RunError: something that is not a run stands in the way, a checkpoint is there and nobody can read what it
                is of, or the place cannot be written.
        """
        self.recover()
        if self.final.exists() and not (self.final / FACTS).is_file():
            raise RunError(f"{self.final} is in the way and is not a run folder; move it or choose another output.")
        if self.partial.exists() and not self.partial.is_dir():
            raise RunError(f"{self.partial} is in the way and is not a folder; move it or choose another output.")
        with writing(self.partial):
            if self.partial.exists() and not self._goes_on(recipe, inputs):
                self.partial.rename(self.discarded)  # at once, so that a kill cannot leave half of it to go on from
                self._discard()
            self.partial.mkdir(exist_ok=True)
            remove_parts(self.partial)
        write_text(self.partial / RECIPE, to_yaml(recipe))
        if inputs is not None:
            write_json(self.partial / INPUTS, dict(inputs))
        return self.partial

    def seal(self) -> None:
        """Note in run.json that nothing is missing, and checksums by which `read_run` knows a cut or changed file."""
        others = (METRICS, INPUTS, PREDICTOR, PREDICTOR_FACTS)
        adapter = sorted(f"{ADAPTER}/{path.name}" for path in (self.partial / ADAPTER).glob("[!.]*"))
        written = (RECIPE, ROUTER, *(name for name in others if (self.partial / name).exists()), *adapter)
        sums = {name: checksum(self.partial / name) for name in written}
        facts = read_json(self.partial / FACTS)
        write_json(self.partial / FACTS, {**facts, "status": "finished", "checksums": sums})

    def sealed(self, recipe: Recipe, inputs: Mapping[str, str]) -> bool:
        """Whether the partial folder holds the whole run of a recipe, which a kill kept from its place."""
        try:
            facts = read_json(self.partial / FACTS)
            begun = load_recipe(self.partial / RECIPE)
            sums = facts["checksums"] if facts["status"] == "finished" else {}
            whole = all(checksum(self.partial / name) == sums[name] for name in (RECIPE, ROUTER, METRICS))
        except (BuddyError, LookupError, TypeError):
            return False
        return whole and begun == recipe and inputs_in(self.partial) == inputs

    def publish(self) -> Path:
        """Put the partial folder in the final place; a kill at any point leaves the old run or the new one."""
        self.seal()
        self.recover()
        with writing(self.final):
            if self.final.exists():
                self.final.rename(self.aside)
            self.partial.rename(self.final)
        self.recover()
        return self.final

    def recover(self) -> None:
        """Finish or take back what a kill left undone in `publish` or `open_partial`; call it with the lock held."""
        self._discard()
        if self.final.exists():
            shutil.rmtree(self.aside, ignore_errors=True)
        elif self.aside.exists():
            with writing(self.final):
                self.aside.rename(self.final)

    def settle(self) -> None:
        """`recover`, where a kill inside `publish` left no run in the final place."""
        if os.path.isdir(self.aside) and not os.path.exists(self.final):  # os.path answers for names that are too long
            with self.lock():
                self.recover()

    def _goes_on(self, recipe: Recipe, inputs: Mapping[str, str] | None) -> bool:
        checkpoint = recipe.trainer.ckpt_path
        if checkpoint and Path(os.path.realpath(checkpoint)).is_relative_to(os.path.realpath(self.partial)):
            return True
        try:
            begun = load_recipe(self.partial / RECIPE)
            made_of = read_json(self.partial / INPUTS) if (self.partial / INPUTS).exists() else None
        except BuddyError as error:
            self._require_no_checkpoint(" ".join(str(error).split()).rstrip("."))
            return False
        same = made_of in (None, inputs) and _without_checkpoint(begun) == _without_checkpoint(recipe)
        if not same and (self.partial / RECIPE).read_text("utf-8") != to_yaml(begun):
            self._require_no_checkpoint(f"{RECIPE} is cut, or of another version")
        return same

    def _require_no_checkpoint(self, reason: str) -> None:
        """Nobody knows what was begun here, so it is not deleted as something else than what is asked for."""
        if any(self.partial.rglob("*.ckpt")):
            raise RunError(
                f"{self.partial} holds a checkpoint, and what it was made by cannot be read ({reason}); delete that "
                "folder to begin anew, or go on from the checkpoint by its name as trainer.ckpt_path."
            )

    def _discard(self) -> None:
        with writing(self.discarded):
            if self.discarded.exists():
                shutil.rmtree(self.discarded)

    def _beside(self, ending: str) -> Path:
        return self.final.with_name(f".{self.final.name}.{ending}")


def inputs_in(folder: Path) -> dict[str, str] | None:
    """Digests of what the run in a folder is made of beside its recipe; None where that is not known."""
    try:
        return read_json(folder / INPUTS)
    except BuddyError:  # none, or cut
        return None


def _holder(pid_file: Path) -> str:
    """The number of the process that holds a lock, which it writes down right after it has taken it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(OSError, ValueError):
            if number := pid_file.read_text().strip():
                return number
        time.sleep(0.02)
    return "unknown"


def _without_checkpoint(recipe: Recipe) -> Recipe:
    return replace(recipe, trainer=replace(recipe.trainer, ckpt_path=None))


def folder_name(name: str) -> str:
    """A name with hyphens for what does not belong in a folder's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".") or "-"


@dataclass(frozen=True)
class Run:
    """A run folder as read. `geometry` has the fields of router.Geometry, `versions` those of the software."""

    folder: Path
    recipe_name: str
    recipe: Recipe
    router_name: str
    backbone: str
    fingerprint: str
    geometry: dict[str, int]
    versions: dict[str, str]
    created: str
    status: str


def write_facts(
    folder: Path, recipe: Recipe, recipe_name: str, *, backbone: str, fingerprint: str, geometry: "Geometry"
) -> None:
    """Write run.json: what is needed to use the run again and to tell how it came about."""
    versions = {"python": platform.python_version(), "buddy": buddy.__version__}
    versions |= {name: version(name) for name in ("torch", "lightning", "transformers")}
    facts = {
        "format": FORMAT,
        "status": "running",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe_name": recipe_name,
        "router_name": recipe.router.name,
        "seed": recipe.seed,
        "backbone": backbone,
        "fingerprint": fingerprint,
        "geometry": asdict(geometry),
        "versions": versions,
    }
    write_json(folder / FACTS, facts)


def save_router(folder: Path, state: Mapping[str, "Tensor"]) -> None:
    """Write router.safetensors from a router's state dict: the same bytes for the same numbers."""
    save_tensors(folder / ROUTER, state, {"format": "pt"})  # of two keys safetensors would not keep the order


def load_router(folder: Path) -> dict[str, "Tensor"]:
    """The state dict in router.safetensors; RunError when missing or DamagedError."""
    return load_tensors(folder / ROUTER)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The results in metrics.json; RunError when missing or DamagedError."""
    return read_json(folder / METRICS)


def read_run(folder: str | Path) -> Run:
    """Everything of a run but its tensors (`load_router`) and results (`read_metrics`).

    Raises:
        RunError: the folder is missing, a file of it is missing or DamagedError, or a newer Buddy made it.
    """
    folder = Path(folder)
    try:
        _require_folder(folder)
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise RunError(
            f"The run folder {folder} cannot be read ({error.strerror or error}); check the path."
        ) from error
    facts = _read_facts(folder)
    try:
        recipe = load_recipe(folder / RECIPE)
    except BuddyError as error:
        raise DamagedError(folder / RECIPE, str(error).rstrip(".")) from error
    return Run(folder=folder, recipe=recipe, **facts)


def check_backbone(run: Run, fingerprint: str) -> None:
    """Raises RunError when the run was made with another backbone than the one with this fingerprint."""
    if run.fingerprint != fingerprint:
        raise RunError(
            f"{run.folder} was made with another backbone ({run.backbone}, fingerprint {run.fingerprint}, not "
            f"{fingerprint}); load that one or make the run again with `buddy fit`."
        )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    facts = read_json(path)
    made = facts.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{folder} was made by a newer Buddy (run format {made}); upgrade Buddy to read it.")
    kinds = {"format": int, **dict.fromkeys(_TEXTS, str), **dict.fromkeys(_MAPPINGS, dict)}
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind) or not storable(facts[name]):
            raise DamagedError(path, f"{name} is missing or wrong")
    sums = facts.get("checksums", {})
    if not isinstance(sums, dict) or not all(map(_lies_within, sums)):
        raise DamagedError(path, "checksums is wrong")
    for name, written in sums.items():
        there = name in (RECIPE, ROUTER) or os.path.lexists(folder / name)  # the others need not be handed on
        if there and checksum(folder / name) != written:
            raise DamagedError(folder / name, "it is not what was written")
    return {name: facts[name] for name in (*_TEXTS, *_MAPPINGS)}


def _lies_within(name: str) -> bool:
    """Whether the name of a file leads nowhere out of its folder."""
    path = PurePath(name)
    return storable(name) and not path.is_absolute() and ".." not in path.parts


def _require_folder(folder: Path) -> None:
    place = RunPlace(Path(os.path.realpath(folder)))
    if not folder.exists():
        place.settle()
    if not folder.is_dir():
        if place.partial.is_dir():
            raise RunError(f"The run {folder} is unfinished; go on with the same `buddy fit` that began it.")
        hint = nearest(folder.name, _runs_in(folder.parent))
        raise RunError(f"There is no run folder {folder}{hint or '; make it with `buddy fit --recipe NAME`.'}")
    inside = _runs_in(folder)
    if inside and not (folder / FACTS).exists():
        raise RunError(f"{folder} is not a run but holds the runs {', '.join(inside)}; name one of them.")
    missing = [name for name in (RECIPE, FACTS, ROUTER) if not (folder / name).is_file()]
    if len(missing) == 3:
        raise RunError(f"{folder} is not a run folder; name one, such as runs/quickstart/buddy.")
    if missing:
        raise RunError(f"The run {folder} is half-written: {missing[0]} is missing; make it again with `buddy fit`.")


def _runs_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"[!.]*/{FACTS}"))
