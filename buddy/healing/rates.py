"""Which learning rate an adapter is trained with: each of `adapter.rates` is tried, and validation windows decide."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from buddy import distributed
from buddy.backbone.adapter import WEIGHTS, Adapter
from buddy.build import healing_identity
from buddy.config import PredictorSection, Recipe, to_yaml
from buddy.console import errors
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, TrainingError
from buddy.fit import forget, heal
from buddy.io import checksum, read_json, write_json
from buddy.router import available_budgets
from buddy.run import ADAPTER
from buddy.training.module import NotFinite, evaluate

RATES = "rates"  # in the folder of an unfinished run, with a folder for each rate
FOUND = "validation.json"  # in that of a rate, once it was tried


def heal_at_the_best(
    recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, callbacks: Sequence[Callback] = ()
) -> dict[float, float]:
    """Train an adapter at each of `adapter.rates`, from the same beginning, and leave the best on the model, frozen.

    The best has the least objective on the validation windows, the mean over the recipe's budgets. What was tried is
    kept until the run is whole, so that an interrupted one does not try it again.

    Args:
        recipe: the whole run, with `adapter.rates`.
        routed: model and router, calibrated and trained.
        data: the text, set up.
        folder: of the run that is being made.
        callbacks: Lightning's, beside those that keep checkpoints and show progress.

    Returns:
        The objective in nats a token for each rate, infinite where its healing did not stay finite.

    Raises:
        TrainingError: no rate stayed finite; or as `heal`.
        KeyboardInterrupt: stopped in good order by a signal.
    """
    distributed.alike(routed.router)
    found: dict[float, float] = {}
    for rate in recipe.adapter.rates:
        place = folder / RATES / str(rate)
        asked = replace(recipe, adapter=replace(recipe.adapter, lr=rate))
        kept = distributed.tell(_kept(place, _made_of(asked, routed, data)) if distributed.leads() else None)
        found[rate] = _try(asked, routed, data, place, callbacks) if kept is None else kept
    best = min(found, key=found.__getitem__)
    if found[best] == math.inf:
        trained = folder / "checkpoints" / "last.ckpt"
        kept_router = f", and trainer.ckpt_path={trained} to keep the router" if trained.exists() else ""
        raise TrainingError(f"Healing stayed finite at none of adapter.rates; give lower ones{kept_router}.")
    errors.print(f"Healed {recipe.router.name} best at a rate of {best:g}, by validation windows", soft_wrap=True)
    routed.adapt(Adapter.load(routed.backbone, folder / RATES / str(best) / ADAPTER))
    routed.adapter.freeze()
    return found


def forget_rates(folder: Path) -> None:
    """Remove the adapters and checkpoints of all rates; their curves stay for TensorBoard."""
    for place in (folder / RATES).glob("*"):
        forget(place)
        (place / FOUND).unlink(missing_ok=True)
        shutil.rmtree(place / ADAPTER, ignore_errors=True)


def _try(recipe: Recipe, routed: RoutedLM, data: TextData, place: Path, callbacks: Sequence[Callback]) -> float:
    """The objective of an adapter that was trained at the recipe's rate; adapter and figure are kept in `place`."""
    kept: dict[str, Any] = {"made_of": _made_of(recipe, routed, data)}
    if distributed.leads():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / FOUND, kept)
    value = math.inf
    with _adapter_off_afterwards(routed):
        try:
            heal(recipe, routed, data, place, callbacks)
            distributed.alike(routed.adapter.parts)
            value = _objective(recipe, routed, data)
            if distributed.leads():
                routed.adapter.save(place / ADAPTER)
                kept["adapter"] = checksum(place / ADAPTER / WEIGHTS)
        except TrainingError as error:
            if not isinstance(error.__cause__, NotFinite):
                raise
            errors.print(f"Left out a rate of {recipe.adapter.lr:g}: {error.__cause__}.", soft_wrap=True)
    if distributed.leads():
        write_json(place / FOUND, kept | {"objective": value if value < math.inf else None})
    distributed.wait()  # all look at what the first one has written
    return value


@contextmanager
def _adapter_off_afterwards(routed: RoutedLM) -> Iterator[None]:
    """The stock modules come back after this block, however it ends."""
    try:
        yield
    finally:
        if routed.adapter is not None:
            routed.adapter.remove()
            routed.adapter = None


def _objective(recipe: Recipe, routed: RoutedLM, data: TextData) -> float:
    """What the recipe trains for, in nats a token, on validation windows: the mean over its budgets."""
    scores = evaluate(
        routed,
        data.validation,
        available_budgets(routed.router, recipe.budgets),
        prompt=recipe.data.prompt,
        batch_size=recipe.data.batch_size,
        description=f"Validating a rate of {recipe.adapter.lr:g}",
    )
    kl, ce = recipe.objective.kl, recipe.objective.ce
    mean = sum(
        (kl * each.mean_kl if kl else 0.0) + (ce * float(each.loss.sum() / each.tokens.sum()) if ce else 0.0)
        for each in scores
    ) / len(scores)
    if not math.isfinite(mean):
        words = f"Left out a rate of {recipe.adapter.lr:g}: its objective on validation windows is not finite."
        errors.print(words, soft_wrap=True)
    return mean if math.isfinite(mean) else math.inf


def _kept(place: Path, made_of: Mapping[str, str]) -> float | None:
    """The objective that an earlier beginning of the same healing found; None where there was none.

    What was begun of another one is removed, its checkpoint and curves with it.
    """
    try:
        held = read_json(place / FOUND)
        if held["made_of"] != made_of:
            shutil.rmtree(place)
            return None
        value = math.inf if held["objective"] is None else float(held["objective"])
        whole = value == math.inf or checksum(place / ADAPTER / WEIGHTS) == held["adapter"]
    except (BuddyError, LookupError, OSError, TypeError, ValueError):
        return None
    return value if whole else None


def _made_of(recipe: Recipe, routed: RoutedLM, data: TextData) -> dict[str, str]:
    """What decides the result of a rate: the recipe but for names and the other rates, the text, and the router."""
    trainer, adapter = replace(recipe.trainer, ckpt_path=None), replace(recipe.adapter, rates=[])
    alone = replace(recipe, output="", rivals=[], predictor=PredictorSection(), trainer=trainer, adapter=adapter)
    texts = f"{data.fingerprint} {data.train_fingerprint}"
    return {"recipe": to_yaml(alone), "texts": texts, **healing_identity(recipe, routed.router)}
