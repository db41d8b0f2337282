"""The files of a run folder: their names, and reading and writing metrics.json, run.json, checksums and the router."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from buddy.errors import BuddyError, DamagedError, RunError
from buddy.io import checksum, load_tensors, read_json, save_tensors, write_json, write_with_checksum
from buddy.provenance import versions
from buddy.schema import Recipe
from buddy.values import flaw

if TYPE_CHECKING:
    from torch import Tensor

    from buddy.router import Geometry

RECIPE = "recipe.yaml"
FACTS = "run.json"
INPUTS = "inputs.json"
ROUTER = "router.safetensors"
METRICS = "metrics.json"
BRIDGE = "bridge.safetensors"
ADAPTER = "adapter"  # the folder of a healed run's adapter
PREDICTOR = "predictor.safetensors"
PREDICTOR_FACTS = "predictor.json"
CHECKPOINTS = "checkpoints"
TARGETS = "predictor-targets"  # the folder of a budget predictor's measurements
LAST, HEALING, FITTED = "last.ckpt", "healing.ckpt", "fitted"  # the folder has router and bridges before healing
FITTED_SUMS = "checksums.json"  # in that folder, written last
FORMAT = 2  # of a run folder; 1 is that of Buddy 0.1, which stored the checksums in run.json
SUMS = "checksums"  # the key of the checksums in metrics.json
_FIELDS: dict[str, type] = {  # of `Run`, in run.json
    **dict.fromkeys(("recipe_name", "router_name", "backbone", "fingerprint"), str),
    **dict.fromkeys(("geometry", "versions"), dict),
}


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, which completes a run, with the checksums of the other files in the folder."""
    optional = [name for name in (INPUTS, BRIDGE, PREDICTOR, PREDICTOR_FACTS) if (folder / name).exists()]
    adapter = sorted(f"{ADAPTER}/{path.name}" for path in (folder / ADAPTER).glob("[!.]*"))
    sums = {name: checksum(folder / name) for name in (RECIPE, FACTS, ROUTER, *optional, *adapter)}
    write_with_checksum(folder / METRICS, {**metrics, SUMS: sums})


def read_metrics(folder: Path) -> dict[str, Any]:
    """The results in metrics.json; DamagedError where they are missing or damaged."""
    metrics = read_json(folder / METRICS)
    metrics.pop(SUMS, None)
    return metrics


def update_checksums(folder: Path) -> None:
    """Recompute the checksums of a complete run, after a deliberate change of one of its files."""
    facts = read_json(folder / FACTS)
    if SUMS in facts:
        there = [name for name in facts[SUMS] if (folder / name).exists()]
        write_json(folder / FACTS, facts | {SUMS: {name: checksum(folder / name) for name in there}})
    else:
        write_metrics(folder, read_metrics(folder))


def checksums_of(folder: Path) -> dict[str, str]:
    """The stored SHA-256 of the files of a complete run, by their paths within the folder.

    Raises:
        DamagedError: they are missing, or a path leads out of the folder.
    """
    path = folder / (FACTS if SUMS in read_json(folder / FACTS) else METRICS)
    sums = read_json(path).get(SUMS)
    if not isinstance(sums, dict) or not all(map(_is_inside, sums)):
        raise DamagedError(path, "checksums is missing or wrong")
    return sums


def check_files(folder: Path) -> None:
    """Raises DamagedError for a file of a run whose checksum is wrong."""
    for name, written in checksums_of(folder).items():
        required = name in (RECIPE, ROUTER)  # a pushed run may leave out the others
        if (required or os.path.lexists(folder / name)) and checksum(folder / name) != written:
            raise DamagedError(folder / name, "its checksum is wrong")


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    path = PurePath(name)
    return not flaw(name) and not path.is_absolute() and ".." not in path.parts


def save_router(folder: Path, state: Mapping[str, "Tensor"]) -> None:
    """Write router.safetensors from a router's state dict: equal tensors give equal bytes."""
    save_tensors(folder / ROUTER, state)


def seal_fitted(folder: Path) -> None:
    """Write the checksums of router and bridges before healing, last of all."""
    write_with_checksum(folder / FITTED_SUMS, {path.name: checksum(path) for path in folder.glob("*.safetensors")})


def is_fitted(folder: Path) -> bool:
    """Whether router and bridges before healing are there, as they were written."""
    try:
        return all(checksum(folder / name) == written for name, written in read_json(folder / FITTED_SUMS).items())
    except BuddyError:
        return False


def load_router(folder: Path) -> dict[str, "Tensor"]:
    """The state dict in router.safetensors; DamagedError where it is missing or damaged."""
    return load_tensors(folder / ROUTER)


def run_facts(
    folder: Path, recipe: Recipe, recipe_name: str, digests: Mapping[str, str], geometry: "Geometry"
) -> dict[str, Any]:
    """The content of run.json: what the run needs to be used again, and how it was made."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe_name": recipe_name,
        "router_name": recipe.router.name,
        "seed": recipe.seed,
        "backbone": recipe.backbone.name,
        "fingerprint": digests["model"],
        "geometry": asdict(geometry),
        "versions": versions(),
        "seconds": seconds_in(folder),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of run.json that a `Run` has as fields.

    Raises:
        DamagedError: one is missing or of another type.
        RunError: a newer Buddy made the run.
    """
    path = folder / FACTS
    facts = read_json(path)
    made = facts.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{folder} was made by a newer Buddy (run format {made}); upgrade Buddy to read it.")
    for name, kind in {"format": int, **_FIELDS}.items():
        if not isinstance(facts.get(name), kind) or flaw(facts[name]):
            raise DamagedError(path, f"{name} is missing or wrong")
    if not all(isinstance(facts["geometry"].get(name), int) for name in ("layers", "hidden")):
        raise DamagedError(path, "geometry is wrong")
    return {name: facts[name] for name in _FIELDS}


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Adds the seconds of this block to those of a run in run.json; `folder` is from `RunFolder.begin`."""
    before, start = seconds_in(folder), time.perf_counter()
    try:
        yield
    finally:
        with suppress(RunError):  # of a full disk, which the next file of the run reports
            seconds = before + time.perf_counter() - start
            write_json(folder / FACTS, read_json(folder / FACTS) | {"seconds": seconds})


def seconds_in(folder: Path) -> float:
    """The seconds of a run's sessions so far; 0 if there were none or the file is damaged."""
    try:
        seconds = read_json(folder / FACTS)["seconds"]
    except (DamagedError, KeyError):
        return 0.0
    return float(seconds) if isinstance(seconds, int | float) else 0.0
