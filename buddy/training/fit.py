"""`buddy fit`: calibrate or train a router and its rivals under one recipe, evaluate them, and leave run folders."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.loggers import TensorBoardLogger

from buddy.assemble import backbone_of, budgets_of, data_of, routed_of
from buddy.backbone import Backbone
from buddy.calibration import Probe
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.evaluation.perplexity import Scores, evaluate
from buddy.evaluation.report import show_comparison, write_results
from buddy.progress import errors, status, track, tracker
from buddy.recipe import with_router
from buddy.registry import load
from buddy.runs import RunPlace, save_router, write_facts
from buddy.schema import Recipe
from buddy.training.data import TextData
from buddy.training.estimator import Estimator, Perturbed, StraightThrough
from buddy.training.interrupt import StopOnSignal, quiet
from buddy.training.module import RoutingModule
from buddy.training.objective import Objective


def fit(recipe: Recipe, recipe_name: str) -> None:
    """Fit the recipe's router, then its rivals, and show them side by side.

    Args:
        recipe: the whole run.
        recipe_name: names the folder of the runs.

    Raises:
        BuddyError: anything that a person can mend; what was finished before stays.
        KeyboardInterrupt: stopped in good order; the same call goes on from a checkpoint.
    """
    recipes = [recipe, *(with_router(recipe, name) for name in recipe.rivals if name != recipe.router.name)]
    for each in recipes:
        load(each.router.name)  # a router that is not there is found before anything long begins
    with status(f"Loading {recipe.backbone.name} …"):
        backbone = backbone_of(recipe)
        for each in recipes:
            routed_of(each, backbone).detach()
    data = data_of(recipe, backbone)
    with status(f"Reading {recipe.data.source} …"):
        data.prepare_data()
        data.setup()
    session = _Session(backbone, data)
    places = [RunPlace.of(each, recipe_name) for each in recipes]
    scores = {
        each.router.name: session.run(each, recipe_name, place) for each, place in zip(recipes, places, strict=True)
    }
    show_comparison(scores, places[0].final.parent, recipe.router.name)


class _Session:
    """One backbone and one text for all the routers of a recipe."""

    def __init__(self, backbone: Backbone, data: TextData) -> None:
        self.backbone, self.data = backbone, data
        self._probe: Probe | None = None

    def run(self, recipe: Recipe, recipe_name: str, place: RunPlace) -> list[Scores]:
        """Fit, evaluate and publish one router."""
        with place.lock():
            folder = place.open_partial(recipe)
            routed = routed_of(recipe, self.backbone)
            try:
                write_facts(
                    folder,
                    recipe,
                    recipe_name,
                    backbone=self.backbone.name,
                    fingerprint=self.backbone.fingerprint,
                    geometry=routed.geometry,
                )
                self._fit(recipe, routed, folder)
                scores = self._evaluate(recipe, routed)
                save_router(folder, routed.router.state_dict())
                write_results(folder, recipe, scores)
            finally:
                routed.detach()
            place.publish()
        return scores

    def _fit(self, recipe: Recipe, routed: RoutedLM, folder: Path) -> None:
        lightning.seed_everything(recipe.seed, verbose=False)
        routed.router.calibrate(self._calibration(routed, recipe.data.batch_size))
        if routed.router.trainable:
            _train(recipe, routed, self.data, folder)
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


def estimator_of(recipe: Recipe) -> Estimator:
    """The recipe's estimator with its objective."""
    section = recipe.objective
    objective = Objective(section.kl, section.ce)
    if section.estimator == "perturbed":
        return Perturbed(objective, section.plans, section.sigma)
    return StraightThrough(objective)


def module_of(recipe: Recipe, routed: RoutedLM) -> RoutingModule:
    """The LightningModule for a recipe."""
    optimizer = recipe.optimizer
    return RoutingModule(
        routed,
        estimator_of(recipe),
        [routed.executed_layers(budget) for budget in budgets_of(recipe, routed)],
        prompt=recipe.data.prompt,
        lr=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        seed=recipe.seed,
    )


def _train(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path) -> None:
    """Train by Lightning, from a checkpoint where there is one."""
    checkpoints = folder / "checkpoints"
    last = checkpoints / "last.ckpt"
    start = recipe.trainer.ckpt_path or (last if last.exists() else None)
    if start and not Path(start).is_file():
        raise TrainingError(f"There is no checkpoint {start}; leave trainer.ckpt_path out or name an existing file.")
    if start:
        errors.print(f"Going on from {start}")
    keeper = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=checkpoints,
        filename="last",
        every_n_train_steps=recipe.trainer.checkpoint_every,
        save_on_exception=False,
        enable_version_counter=False,
    )
    stop = StopOnSignal(last)
    trainer = lightning.Trainer(
        max_steps=recipe.trainer.max_steps,
        max_epochs=-1,
        accelerator=recipe.trainer.accelerator,
        devices=recipe.trainer.devices,
        strategy=recipe.trainer.strategy,
        log_every_n_steps=recipe.trainer.log_every,
        callbacks=[keeper, stop],
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        enable_model_summary=False,
        deterministic="warn",
    )
    module = module_of(recipe, routed)
    with quiet():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except TrainingError:
            trainer.save_checkpoint(checkpoints / "before-failure.ckpt")
            raise
        except (KeyError, RuntimeError, EOFError) as error:
            if start and trainer.global_step == 0:
                raise TrainingError(
                    f"The checkpoint {start} cannot be read ({error}); delete it and start anew."
                ) from error
            raise
    if stop.asked:
        errors.print(f"A checkpoint of step {trainer.global_step} of {recipe.trainer.max_steps} is kept.")
        raise KeyboardInterrupt
