"""The runs of a comparison, and whether what lies in their folders may stand in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from buddy.config import PredictorSection, Recipe, flatten, load_recipe
from buddy.values import shown
from buddy.errors import BuddyError, DamagedError, RunError
from buddy.io import damaged
from buddy.run import FACTS, METRICS, RECIPE, RunPlace, check_backbone, inputs_in, read_metrics, read_run
from buddy.scoring.perplexity import scores_of

FREE = ("output", "rivals", "trainer.ckpt_path")  # keys that change nothing in the run
TRAINING = ("trainer.", "objective.", "optimizer.", "data.train_sources")  # change nothing in what is not trained


@dataclass(frozen=True)
class Planned:
    """One run to be made or reused: a router under the recipe with one seed.

    Attributes:
        trained: whether the recipe's training has a part in it.
        lent: a finished run whose router it takes instead of calibrating and training its own.
    """

    label: str
    recipe: Recipe
    folder: Path
    trained: bool = True
    lent: Path | None = None

    @property
    def seed(self) -> int:
        """The seed of the router: of its first weights, its search and its training."""
        return self.recipe.seed

    @property
    def place(self) -> RunPlace:
        """Where the run is kept."""
        return RunPlace(self.folder)

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return f"{self.label}, seed {self.seed}"


def base_of(recipe: Recipe) -> Recipe:
    """What the recipes of all runs have in common: the seed of the data is fixed, so that seeds are routers' alone.

    A budget predictor is left out: budgets are the same for all.
    """
    return replace(
        recipe,
        data=replace(recipe.data, seed=recipe.data_seed),
        rivals=[],
        predictor=PredictorSection(),
        trainer=replace(recipe.trainer, ckpt_path=None),
    )


def planned(label: str, recipe: Recipe, folder: Path, seeds: int, trained: bool = True) -> list[Planned]:
    """A run for each of `seeds` seeds from the recipe's on."""
    runs = (replace(recipe, seed=recipe.seed + number) for number in range(seeds))
    return [Planned(label, each, folder / f"seed-{each.seed}", trained) for each in runs]


def is_finished(run: Planned) -> bool:
    """Whether the run is whole in its folder."""
    return (run.folder / FACTS).is_file()


def finished_seeds(folder: Path) -> list[int]:
    """The seeds of the finished runs in the folder of one router, in order."""
    names = (facts.parent.name.removeprefix("seed-") for facts in folder.glob(f"seed-*/{FACTS}"))
    return sorted(int(name) for name in names if name.isdecimal())


def with_lent(run: Planned, lender: Planned, made_of: Mapping[str, str], windows: str) -> Planned:
    """The run with the router of one that was made under the same recipe without an adapter, if that is finished.

    Args:
        lender: in its folder, with the recipe of `run`; `trained` says whether training has a part in its router.
        made_of: digests of model, text and code.
        windows: fingerprint of the recipe's test windows.

    Raises:
        RunError: the lender was made otherwise, or was healed itself.
    """
    if not is_finished(lender):
        return run
    with _mendable(lender):
        healed = read_run(lender.folder).recipe.adapter is not None
    if healed:
        raise RunError(f"{lender.folder} was healed itself; name the comparison that it came from as --trained.")
    free = (*FREE, "adapter", *(() if lender.trained else TRAINING))
    keys = list(_differing(lender, free))
    changed = _changed(lender, made_of)
    if keys or changed:
        reason = f"another recipe ({'; '.join(keys)})" if keys else f"another {' and another '.join(changed)}"
        raise RunError(f"{lender.folder} was made with {reason} and cannot lend its router; leave --trained out.")
    _check_whole(lender, made_of["model"], windows)
    return replace(run, lent=lender.folder)


def check_reuse(runs: Sequence[Planned], made_of: Mapping[str, Mapping[str, str]], windows: str) -> None:
    """Refuse finished and unfinished runs that were not made as these are.

    Args:
        made_of: digests of model, text and code, by router.
        windows: fingerprint of the recipe's test windows.

    Raises:
        RunError: other recipes, with the keys that differ; another backbone; another text.
    """
    found = [(run, list(_differing(run))) for run in runs]
    wrong = [run for run, keys in found if keys]
    if wrong:
        first, *others = wrong
        keys = "; ".join(dict.fromkeys(key for _, keys in found for key in keys))
        more = f" and {len(others)} more were" if others else " was"
        raise RunError(
            f"{_where(first)}{more} made with another recipe ({keys}) and cannot stand in this comparison; give "
            "another --out, or delete that folder."
        )
    for run in filter(is_finished, runs):  # unfinished ones begin anew where something changed
        changed = _changed(run, made_of[run.recipe.router.name])
        if changed:
            raise RunError(
                f"{run.folder} was made before the {' and the '.join(changed)} changed and cannot stand in this "
                "comparison; give another --out, or delete that folder."
            )
        _check_whole(run, made_of[run.recipe.router.name]["model"], windows)


def _changed(run: Planned, made_of: Mapping[str, str]) -> list[str]:
    """What a finished run was made of that is another now."""
    return [name for name, digest in (inputs_in(run.folder) or {}).items() if made_of.get(name) != digest]


def again(error: DamagedError, folder: Path) -> RunError:
    """The error for a damaged run of a comparison, which its command alone makes again."""
    return RunError(
        f"{error.path} is damaged ({error.reason}); delete {folder} and repeat the `buddy compare` that made it."
    )


@contextmanager
def _mendable(run: Planned) -> Iterator[None]:
    """Within this block a damaged file of a finished run is told as what it is here."""
    try:
        yield
    except DamagedError as error:
        raise again(error, run.folder) from error


def _check_whole(run: Planned, model: str, windows: str) -> None:
    """Raises RunError where a finished run lacks results, is of another model, or was measured on other windows."""
    with _mendable(run):
        check_backbone(read_run(run.folder), model)
        metrics = read_metrics(run.folder)
        if not _is_complete(metrics):
            raise damaged(run.folder / METRICS, "something is missing or wrong in it")
    if metrics.get("windows") != windows:
        raise RunError(
            f"{run.folder} was measured on other test windows, so the text in {run.recipe.data.source} has changed "
            "since; give another --out, or delete that folder."
        )


def _is_complete(metrics: Mapping[str, Any]) -> bool:
    """Whether all that a comparison reads of a run is in its metrics.json."""
    try:
        scores_of(metrics)
        return all(math.isfinite(metrics["fit"][name]) for name in ("seconds", "parameters"))
    except (LookupError, TypeError, ValueError):
        return False


def _where(run: Planned) -> Path:
    """What there is of a run: its folder, or that of an unfinished one."""
    return run.folder if is_finished(run) else run.place.partial


def _differing(run: Planned, free: Sequence[str] | None = None) -> Iterator[str]:
    """ "key: there, here" for each key of the recipe that differs from that of the run in the folder.

    Args:
        free: beginnings of keys that may differ; by default those that change nothing in the run.
    """
    if is_finished(run):
        with _mendable(run):
            there = read_run(run.folder).recipe
    else:
        try:
            there = load_recipe(run.place.partial / RECIPE)
        except BuddyError:  # none, or one that was cut: it starts anew
            return
    one, other = flatten(there), flatten(run.recipe)
    free = free or (FREE if run.trained else (*FREE, *TRAINING))
    for key in dict.fromkeys([*one, *other]):
        if not key.startswith(tuple(free)) and one.get(key) != other.get(key):
            yield f"{key}: {_spelt(one, key)} there, {_spelt(other, key)} here"


def _spelt(flat: Mapping[str, object], key: str) -> str:
    return shown(flat[key]) if key in flat else "not set"
