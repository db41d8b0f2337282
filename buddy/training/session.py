"""One router after another under one backbone and text: calibrated, trained, healed, measured and published."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning

from buddy import distributed as processes
from buddy.backbone.adapter import check_targets
from buddy.backbone.load import Backbone
from buddy.backbone.sharding import check, shards
from buddy.build import budgets_of, build_backbone, build_data, build_model, heals, restore_router
from buddy.calibration.probe import Probe
from buddy.calibration.store import cache_folder
from buddy.config import Recipe
from buddy.console import status, track, tracker
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, RecipeError, TrainingError
from buddy.evaluation.report import write_results
from buddy.fit import check_checkpoint, forget, heal, train, trainer_of, trains_both
from buddy.healing.rates import forget_rates, heal_at_the_best
from buddy.io import on_disk, within_memory
from buddy.predictor.fit import arms_of, fit_predictor, forget_targets
from buddy.registry import load
from buddy.router import AnyRouter
from buddy.run import ADAPTER, RunPlace, read_metrics, save_router, write_facts
from buddy.scoring.perplexity import Reference, Scores, evaluate, scores_of
from buddy.training.callbacks import quiet
from buddy.training.inputs import inputs_of
from buddy.training.ledger import Ledger
from buddy.training.stopwatch import Stopwatch

WATCH = "seconds.json"  # in the folder of an unfinished run


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
    check(recipe)
    if recipe.trainer.ckpt_path:
        check_checkpoint(recipe.trainer.ckpt_path)
    with status(f"Loading {recipe.backbone.name} …"):
        backbone = build_backbone(recipe, stays=shards(recipe.trainer))
        for each in recipes:
            routed = build_model(each, backbone)
            _check_start(each, routed.router)
            if each.predictor.name is not None:
                arms_of(each, routed)
            routed.detach()
        if recipe.adapter is not None:
            check_targets(recipe.adapter.targets, backbone)
    data = build_data(recipe, backbone)
    data.check_shares(math.prod(processes.shape(recipe.trainer)))
    with status(f"Reading {recipe.data.source} …"):
        data.prepare_data()
        data.setup()
    return backbone, data


def _check_start(recipe: Recipe, router: AnyRouter) -> None:
    """Raises RecipeError for a checkpoint to go on from where no training would read it."""
    if recipe.trainer.ckpt_path and not router.trainable:
        raise RecipeError(f"The router {recipe.router.name} is not trained; leave trainer.ckpt_path out.")
    if recipe.trainer.ckpt_path and trains_both(recipe, router):
        raise RecipeError(
            "adapter.joint=true trains router and adapter from the start; leave trainer.ckpt_path out, or set it to "
            "false."
        )


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

    def kept(self, recipe: Recipe, place: RunPlace, ledger: Ledger) -> list[Scores] | None:
        """The results of a router that an earlier beginning of the same fit finished; None where none did."""
        return ledger.scores(recipe, place, inputs_of(recipe, self.backbone, self.data))

    def run(self, recipe: Recipe, recipe_name: str, place: RunPlace, lent: Path | None = None) -> list[Scores]:
        """Fit, evaluate and publish one router.

        Args:
            lent: a finished run of the same recipe but for the adapter, whose router is taken as it is.
        """
        with on_disk(place.final), place.lock(), self.routed(recipe) as routed:
            inputs = inputs_of(recipe, self.backbone, self.data)
            if processes.count() == 1 and place.sealed(recipe, inputs):
                _tidy(place.partial)
                return scores_of(read_metrics(place.publish()))
            folder = place.open_partial(recipe, inputs)
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
                processes.wait()  # the others look into the folder from here on
                sizes = f"a batch of {recipe.data.batch_size} × {recipe.data.window} tokens"
                with within_memory(sizes, "set data.batch_size or data.window smaller, or objective.plans=2"):
                    before = 0.0 if lent is None else read_metrics(lent)["fit"]["seconds"]
                    rates = self._fit(recipe, routed, folder, lent)
                    spent = {"seconds": before + watch.seconds, "parameters": _parameters(routed)}
                    watch.save()
                    fitted = True
                    fit_predictor(recipe, routed, self.data, folder)
                    scores = self._evaluate(recipe, routed)
                save_router(folder, routed.router.state_dict())
                if routed.adapter is not None:
                    routed.adapter.save(folder / ADAPTER)
                write_results(folder, recipe, scores, fit=spent, windows=self.data.test.fingerprint, rates=rates)
                place.seal()
                _tidy(folder)
            except BaseException as error:
                goes_on = isinstance(error, KeyboardInterrupt) or any(folder.rglob("*.ckpt"))
                if not goes_on:
                    shutil.rmtree(folder, ignore_errors=True)
                elif not fitted:  # evaluation's time is not saved as fitting's
                    with suppress(BuddyError):  # on a full disk, say
                        watch.save()  # there is something to go on from, if only the time that was spent
                raise
            place.publish()
        return scores

    def follow(self, recipes: Sequence[Recipe], places: Sequence[RunPlace]) -> None:
        """Take part in the training and evaluation of all routers beside the process that leads."""
        for recipe, place in zip(recipes, places, strict=True):
            if processes.tell():  # it is finished
                continue
            with self.routed(recipe) as routed:
                processes.wait()
                try:
                    self._fit(recipe, routed, place.partial)
                    self._evaluate(recipe, routed)
                except (TrainingError, KeyboardInterrupt) as error:
                    raise SystemExit(2) from error

    @contextmanager
    def routed(self, recipe: Recipe) -> Iterator[RoutedLM]:
        """The recipe's router on the backbone, its first weights drawn from the recipe's seed."""
        lightning.seed_everything(recipe.seed, verbose=False)
        routed = build_model(recipe, self.backbone)
        try:
            yield routed
        finally:
            routed.detach()

    def _fit(self, recipe: Recipe, routed: RoutedLM, folder: Path, lent: Path | None = None) -> dict[float, float]:
        """Calibrate, train and heal; what validation windows said of the adapter's rates, where several are asked."""
        self.data.train_seed = recipe.seed
        callbacks = [self._watch] if self._watch else []
        if lent is not None:
            restore_router(routed, lent)
            (folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)  # of a router begun here before
        else:
            self._calibrate(recipe, routed)
            both = trains_both(recipe, routed.router)
            if routed.router.trainable and not both:
                train(recipe, routed, self.data, folder, callbacks)
            if not both:
                routed.router.eval().requires_grad_(False)
        if not heals(recipe, routed.router):
            return {}
        if recipe.adapter.rates:
            return heal_at_the_best(recipe, routed, self.data, folder, callbacks)
        heal(recipe, routed, self.data, folder, callbacks)
        return {}

    def _calibrate(self, recipe: Recipe, routed: RoutedLM) -> None:
        """Let the router measure: by all together where weights are shared out, else by the first process.

        Others follow where something may be left for training that is in no state; they find what it kept on disk.
        """
        with nullcontext() if shards(recipe.trainer) else processes.leader_first():
            if processes.leads() or shards(recipe.trainer) or routed.router.trainable:
                probe = self._calibration(recipe, routed)
                routed.router.calibrate(probe)
                probe.release()
        processes.alike(routed.router)

    def _calibration(self, recipe: Recipe, routed: RoutedLM) -> Probe:
        """One probe for all routers: what one measured, the next need not."""
        if self._probe is None:
            windows, data = self.data.calibration.input_ids, recipe.data
            store = None if shards(recipe.trainer) else cache_folder()  # all together: none may know more than another
            options: dict[str, Any] = {"prompt": data.prompt, "store": store}
            # One window at a time is quickest on a CPU, and searches that look at few windows pay for no others.
            size = 1 if self.backbone.device.type == "cpu" else data.batch_size
            self._probe = Probe(routed, windows, size, self._track, **options)
        self._probe.seed = recipe.seed
        self._probe.serve(routed, [routed.executed_layers(budget) for budget in budgets_of(recipe, routed)])
        return self._probe

    def _evaluate(self, recipe: Recipe, routed: RoutedLM) -> list[Scores]:
        """By all processes, with one and the same router and adapter."""
        for part in (routed.router, *([] if routed.adapter is None else [routed.adapter.parts])):
            processes.alike(part)
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
    """Numbers that router and adapter add to the model for training; what was only measured is not among them."""
    adapter = 0 if routed.adapter is None else routed.adapter.size
    return sum(parameter.numel() for parameter in routed.router.parameters()) + adapter


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    (folder / WATCH).unlink(missing_ok=True)
    forget(folder)
    forget_rates(folder)
    forget_targets(folder)
