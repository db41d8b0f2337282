"""What a run folder holds: written by `buddy fit`, read by `buddy evaluate` and `buddy generate`.

recipe.yaml is the resolved recipe; run.json has versions, seed, backbone, geometry and dates; inputs.json has digests
of what the run was made of beside the recipe; router.safetensors
has the router's parameters and buffers (never pickle); metrics.json has the results. Checkpoints and the files of
TensorBoard lie beside them.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import buddy
from buddy.config import Recipe, load_recipe, storable
from buddy.errors import BuddyError, RunError, nearest
from buddy.files import checksum, damaged, load_tensors, read_json, save_tensors, write_json
from buddy.place import FACTS, METRICS, RECIPE, ROUTER, RunPlace

if TYPE_CHECKING:
    from torch import Tensor

    from buddy.router import Geometry

FORMAT = 1
_TEXTS = ("recipe_name", "router_name", "backbone", "fingerprint", "created", "status")
_MAPPINGS = ("geometry", "versions")


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
    """The state dict in router.safetensors; RunError when missing or damaged."""
    return load_tensors(folder / ROUTER)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The results in metrics.json; RunError when missing or damaged."""
    return read_json(folder / METRICS)


def read_run(folder: str | Path) -> Run:
    """Everything of a run but its tensors (`load_router`) and results (`read_metrics`).

    Raises:
        RunError: the folder is missing, a file of it is missing or damaged, or a newer Buddy made it.
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
        raise damaged(folder / RECIPE, str(error).rstrip(".")) from error
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
            raise damaged(path, f"{name} is missing or wrong")
    sums = facts.get("checksums", {})
    if not isinstance(sums, dict) or not all(map(_lies_within, sums)):
        raise damaged(path, "checksums is wrong")
    for name, written in sums.items():
        there = name in (RECIPE, ROUTER) or os.path.lexists(folder / name)  # the others need not be handed on
        if there and checksum(folder / name) != written:
            raise damaged(folder / name, "it is not what was written")
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
