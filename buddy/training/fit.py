"""`buddy fit`: calibrate or train a router and its rivals under one recipe, evaluate them, and leave run folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from buddy import progress
from buddy.assemble import backbone_of, budgets_of, data_of, routed_of
from buddy.backbone import Backbone
from buddy.calibration import Probe
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.evaluation.perplexity import Scores, evaluate
from buddy.evaluation.report import show_comparison, write_results
from buddy.memory import within_memory
from buddy.progress import status, track, tracker
from buddy.recipe import with_router
from buddy.registry import load
from buddy.runs import RunPlace, save_router, write_facts
from buddy.schema import Recipe
from buddy.training.data import TextData
from buddy.training.interrupt import quiet
from buddy.training.train import check_checkpoint, train, trainer_of


def fit(recipe: Recipe, recipe_name: str) -> None:
    """Fit the recipe's router and its rivals, and show them side by side.

    Rivals come first: they take little time, so that what is stopped and repeated is the training that can go on.

    Args:
        recipe: the whole run.
        recipe_name: names the folder of the runs.

    Raises:
        BuddyError: anything that a person can mend; what was finished before stays.
        KeyboardInterrupt: stopped in good order; the same call goes on from a checkpoint.
    """
    leads = rank_zero_only.rank == 0  # Lightning starts the other processes of a distributed run by the same command
    progress.errors.quiet = progress.results.quiet = not leads
    recipes = [*(_rival(recipe, name) for name in recipe.rivals if name != recipe.router.name), recipe]
    backbone, data = _prepare(recipes)
    session = _Session(backbone, data)
    places = [RunPlace.of(each, recipe_name) for each in recipes]
    if not leads:
        return session.follow(recipes, places)
    scores = {
        each.router.name: session.run(each, recipe_name, place) for each, place in zip(recipes, places, strict=True)
    }
    ordered = {name: scores[name] for name in (recipe.router.name, *recipe.rivals)}
    show_comparison(ordered, places[-1].final.parent, recipe.router.name)


def _rival(recipe: Recipe, name: str) -> Recipe:
    """The recipe for another router; a checkpoint is the recipe's own router's."""
    return replace(with_router(recipe, name), trainer=replace(recipe.trainer, ckpt_path=None))


def _prepare(recipes: list[Recipe]) -> tuple[Backbone, TextData]:
    """Backbone and text; whatever is wrong with the recipes is found here, before anything long or written begins."""
    recipe = recipes[-1]
    for each in recipes:
        load(each.router.name)
    with quiet():
        trainer_of(recipe, logger=False)
    if recipe.trainer.ckpt_path:
        check_checkpoint(recipe.trainer.ckpt_path)
    with status(f"Loading {recipe.backbone.name} …"):
        backbone = backbone_of(recipe)
        for each in recipes:
            routed_of(each, backbone).detach()
    data = data_of(recipe, backbone)
    with status(f"Reading {recipe.data.source} …"):
        data.prepare_data()
        data.setup()
    return backbone, data


class _Session:
    """One backbone and one text for all the routers of a recipe."""

    def __init__(self, backbone: Backbone, data: TextData) -> None:
        self.backbone, self.data = backbone, data
        self._probe: Probe | None = None

    def run(self, recipe: Recipe, recipe_name: str, place: RunPlace) -> list[Scores]:
        """Fit, evaluate and publish one router."""
        with place.lock(), self._routed(recipe) as routed:
            folder = place.open_partial(recipe)
            try:
                write_facts(
                    folder,
                    recipe,
                    recipe_name,
                    backbone=self.backbone.name,
                    fingerprint=self.backbone.fingerprint,
                    geometry=routed.geometry,
                )
                sizes = f"a batch of {recipe.data.batch_size} × {recipe.data.window} tokens"
                with within_memory(sizes, "set data.batch_size or data.window smaller, or objective.plans=2"):
                    self._fit(recipe, routed, folder)
                    scores = self._evaluate(recipe, routed)
                save_router(folder, routed.router.state_dict())
                write_results(folder, recipe, scores)
            except BaseException:
                if not any(folder.glob("checkpoints/*.ckpt")):  # nothing to go on from
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            place.publish()
        return scores

    def follow(self, recipes: Sequence[Recipe], places: Sequence[RunPlace]) -> None:
        """Take part in the training of all routers beside the process that leads, which alone writes and speaks."""
        for recipe, place in zip(recipes, places, strict=True):
            with self._routed(recipe) as routed:
                if routed.router.trainable:
                    try:
                        self._fit(recipe, routed, place.partial)
                    except (TrainingError, KeyboardInterrupt) as error:
                        raise SystemExit(2) from error

    @contextmanager
    def _routed(self, recipe: Recipe) -> Iterator[RoutedLM]:
        """The recipe's router on the backbone, its first weights drawn from the recipe's seed."""
        lightning.seed_everything(recipe.seed, verbose=False)
        routed = routed_of(recipe, self.backbone)
        try:
            yield routed
        finally:
            routed.detach()

    def _fit(self, recipe: Recipe, routed: RoutedLM, folder: Path) -> None:
        routed.router.calibrate(self._calibration(routed, recipe.data.batch_size))
        if routed.router.trainable:
            train(recipe, routed, self.data, folder)
        routed.router.eval().requires_grad_(False)

    def _calibration(self, routed: RoutedLM, batch_size: int) -> Probe:
        """One probe for all routers: what one measured, the next need not."""
        if self._probe is None:
            self._probe = Probe(routed, self.data.calibration.input_ids, batch_size, track)
        self._probe.routed = routed
        return self._probe

    def _evaluate(self, recipe: Recipe, routed: RoutedLM) -> list[Scores]:
        return evaluate(
            routed,
            self.data.test,
            budgets_of(recipe, routed),
            prompt=recipe.data.prompt,
            batch_size=recipe.data.batch_size,
            track=tracker(f"Evaluating {recipe.router.name}"),
        )
