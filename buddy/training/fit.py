"""`buddy fit`: calibrate or train a router and its rivals under one recipe, evaluate them, and leave run folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from buddy import progress
from buddy.assemble import backbone_of, budgets_of, data_of, routed_of
from buddy.backbone import Backbone
from buddy.calibration import Probe, cache_folder
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.evaluation.perplexity import Scores, evaluate
from buddy.evaluation.reference import Reference
from buddy.evaluation.report import show_comparison, write_results
from buddy.memory import within_memory
from buddy.progress import status, track, tracker
from buddy.recipe import with_router
from buddy.registry import load
from buddy.runs import RunPlace, save_router, write_facts
from buddy.schema import Recipe
from buddy.training.data import TextData
from buddy.training.inputs import inputs_of
from buddy.training.interrupt import quiet
from buddy.training.stopwatch import Stopwatch
from buddy.training.train import check_checkpoint, train, trainer_of

WATCH = "seconds.json"  # in the folder of an unfinished run


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
    session = Session(*prepare(recipes))
    places = [RunPlace.of(each, recipe_name) for each in recipes]
    if not leads:
        return session.follow(recipes, places)
    scores = {
        each.router.name: session.run(each, recipe_name, place) for each, place in zip(recipes, places, strict=True)
    }
    ordered = {name: scores[name] for name in (recipe.router.name, *recipe.rivals)}
    folders = {each.router.name: place.final for each, place in zip(recipes, places, strict=True)}
    show_comparison(ordered, folders, recipe.router.name)


def _rival(recipe: Recipe, name: str) -> Recipe:
    """The recipe for another router; a checkpoint is the recipe's own router's."""
    return replace(with_router(recipe, name), trainer=replace(recipe.trainer, ckpt_path=None))


def prepare(recipes: Sequence[Recipe]) -> tuple[Backbone, TextData]:
    """Backbone and text; whatever is wrong with the recipes is found here, before anything long or written begins.

    Args:
        recipes: alike but for the router and the seed.
    """
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


class Session:
    """One backbone and one text for all the routers of a recipe.

    Args:
        backbone: not routed yet.
        data: the text, set up.
    """

    def __init__(self, backbone: Backbone, data: TextData) -> None:
        self.backbone, self.data = backbone, data
        self._probe: Probe | None = None
        self._watch: Stopwatch | None = None
        self._reference = Reference()

    def run(self, recipe: Recipe, recipe_name: str, place: RunPlace) -> list[Scores]:
        """Fit, evaluate and publish one router."""
        with place.lock(), self.routed(recipe) as routed:
            folder = place.open_partial(recipe, inputs_of(recipe, self.backbone, self.data))
            watch, fitted = Stopwatch(folder / WATCH), False
            self._watch = watch
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
                    spent = {"seconds": watch.seconds, "parameters": _parameters(routed)}
                    watch.save()
                    fitted = True
                    scores = self._evaluate(recipe, routed)
                save_router(folder, routed.router.state_dict())
                write_results(folder, recipe, scores, fit=spent, windows=self.data.test.fingerprint)
                watch.forget()
            except BaseException as error:
                goes_on = isinstance(error, KeyboardInterrupt) or any(folder.glob("checkpoints/*.ckpt"))
                if not goes_on:
                    shutil.rmtree(folder, ignore_errors=True)
                elif not fitted:  # evaluation's time is not saved as fitting's
                    watch.save()  # there is something to go on from, if only the time that was spent
                raise
            place.publish()
        return scores

    def follow(self, recipes: Sequence[Recipe], places: Sequence[RunPlace]) -> None:
        """Take part in the training of all routers beside the process that leads, which alone writes and speaks."""
        for recipe, place in zip(recipes, places, strict=True):
            with self.routed(recipe) as routed:
                if routed.router.trainable:
                    try:
                        self._fit(recipe, routed, place.partial)
                    except (TrainingError, KeyboardInterrupt) as error:
                        raise SystemExit(2) from error

    @contextmanager
    def routed(self, recipe: Recipe) -> Iterator[RoutedLM]:
        """The recipe's router on the backbone, its first weights drawn from the recipe's seed."""
        lightning.seed_everything(recipe.seed, verbose=False)
        routed = routed_of(recipe, self.backbone)
        try:
            yield routed
        finally:
            routed.detach()

    def _fit(self, recipe: Recipe, routed: RoutedLM, folder: Path) -> None:
        probe = self._calibration(recipe, routed)
        routed.router.calibrate(probe)
        probe.release()
        if routed.router.trainable:
            self.data.train_seed = recipe.seed
            train(recipe, routed, self.data, folder, [self._watch] if self._watch else [])
        routed.router.eval().requires_grad_(False)

    def _calibration(self, recipe: Recipe, routed: RoutedLM) -> Probe:
        """One probe for all routers: what one measured, the next need not."""
        if self._probe is None:
            windows, data = self.data.calibration.input_ids, recipe.data
            options = {"prompt": data.prompt, "store": cache_folder()}
            # One window at a time is quickest on a CPU, and searches that look at few windows pay for no others.
            size = 1 if self.backbone.device.type == "cpu" else data.batch_size
            self._probe = Probe(routed, windows, size, self._track, **options)
        self._probe.seed = recipe.seed
        self._probe.serve(routed, [routed.executed_layers(budget) for budget in budgets_of(recipe, routed)])
        return self._probe

    def _evaluate(self, recipe: Recipe, routed: RoutedLM) -> list[Scores]:
        return evaluate(
            routed,
            self.data.test,
            budgets_of(recipe, routed),
            prompt=recipe.data.prompt,
            batch_size=recipe.data.batch_size,
            track=tracker(f"Evaluating {recipe.router.name}"),
            reference=self._reference,
        )

    def _track(self, items: Sequence[Any], words: str) -> Iterable[Any]:
        """`track`, and the time spent is kept on the way."""
        for item in track(items, words):
            yield item
            if self._watch:
                self._watch.tick()


def _parameters(routed: RoutedLM) -> int:
    """Numbers that the router adds to the model for training; what it only measured is not among them."""
    return sum(parameter.numel() for parameter in routed.router.parameters())
