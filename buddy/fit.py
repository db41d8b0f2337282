"""`buddy fit`: calibrate or train a router and its rivals under one recipe, evaluate them, and leave run folders."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from buddy import console, distributed
from buddy.backbone.adapter import check_targets
from buddy.backbone.load import Backbone
from buddy.backbone.sharding import check_sharding, finish_sharding, is_sharded, join, shard
from buddy.build import (
    attach_predictor,
    build_adapter,
    build_backbone,
    build_data,
    build_healing,
    build_model,
    build_module,
    build_trainer,
    heals,
    instantiate,
    restore_router,
    trains_both,
)
from buddy.calibration.probe import CalibrationProbe
from buddy.config import PredictorSection, Recipe, Rival, with_router
from buddy.console import errors, quiet, status, track
from buddy.data.module import TextData
from buddy.data.text import named_sources
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, RecipeError, TrainingError
from buddy.evaluation import report
from buddy.evaluation.record import collect, shown_command, text_entry
from buddy.io import cache_folder, on_disk, within_memory
from buddy.predictor.fit import fit_predictor, predictor_arms, remove_targets
from buddy.registry import load
from buddy.router import AnyRouter, available_budgets
from buddy.run import ADAPTER, RunFolder, Stopwatch, input_digests, read_metrics, save_router
from buddy.scoring.perplexity import Reference, Scores, scores_of
from buddy.training.callbacks import (
    AtomicCheckpointIO,
    GracefulStop,
    LastCheckpoint,
    ProgressLine,
    SaveSeconds,
    check_checkpoint,
    unusable,
)
from buddy.training.module import NotFinite, evaluate


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
    leads = distributed.is_global_zero()  # the others of a distributed run are begun by the same command
    console.errors.quiet = console.results.quiet = not leads
    rivals = {rival.label: _rival(recipe, rival) for rival in recipe.rivals if rival.label != recipe.router.name}
    labels, recipes = [*rivals, recipe.router.name], [*rivals.values(), recipe]
    places = [RunFolder.of(each, recipe_name, label) for label, each in zip(labels, recipes, strict=True)]
    session = _begin(recipes, places)
    with distributed.lost_peers_reported():
        if not leads:
            return session.follow(recipes, places)
        for number, (label, each, place) in enumerate(zip(labels, recipes, places, strict=True), start=1):
            kept = session.stored(each, place)
            if len(recipes) > 1:
                done = "" if kept is None else ", finished before"
                console.errors.print(f"Router {number} of {len(recipes)}: {label}{done}", soft_wrap=True)
            distributed.broadcast(kept is not None)
            if kept is None:
                session.run(each, recipe_name, place)
    folders = {label: [place.path] for label, place in zip(labels, places, strict=True)}
    source = recipe.data.source
    (text,) = named_sources(None, source)
    record = collect(
        {label: folders[label] for label in (recipe.router.name, *rivals)},
        command=shown_command(["buddy", "fit", "--recipe", recipe_name]),
        recipe=recipe,
        layers=session.backbone.num_layers,
        texts=[text_entry(text, source, session.data.test, own=True)],
    )
    report.write(record, places[-1].path.parent.parent)


def _begin(recipes: Sequence[Recipe], places: Sequence[RunFolder]) -> Session:
    """Backbone and text in each process, once the first has found all well, and the processes together."""
    leads, trainer = distributed.is_global_zero(), recipes[-1].trainer
    if not leads or distributed.torchrun_world_size() > 1:
        join(trainer)  # all are there already
    with distributed.one_by_one(trainer) if is_sharded(trainer) else distributed.rank_zero_first():
        session = Session(*prepare(recipes))
        for place in places if leads else ():
            with place.lock():  # a second fit is refused here, before it does anything
                pass
        join(trainer)
        if is_sharded(trainer):
            shard(session.backbone, trainer["accelerator"])
    if is_sharded(trainer):
        finish_sharding(session.backbone)
    return session


def _rival(recipe: Recipe, rival: Rival) -> Recipe:
    """The recipe for another router; a checkpoint and the budget predictor are the recipe's own router's."""
    return replace(with_router(recipe, rival), ckpt_path=None, predictor=PredictorSection())


def prepare(recipes: Sequence[Recipe]) -> tuple[Backbone, TextData]:
    """Backbone and text; whatever is wrong with the recipes is found here, before anything long or written begins.

    Args:
        recipes: alike but for the router and the seed.
    """
    recipe = recipes[-1]
    for each in recipes:
        load(each.router.name)
    with quiet():
        build_trainer(recipe, logger=False)
    for spec in (*recipe.callbacks, *filter(None, [recipe.logger])):
        instantiate(spec)
    check_sharding(recipe)
    if recipe.ckpt_path:
        check_checkpoint(recipe.ckpt_path)
    with status(f"Loading {recipe.backbone.name} …"):
        backbone = build_backbone(recipe, on_cpu=is_sharded(recipe.trainer))
        for each in recipes:
            routed = build_model(each, backbone)
            _check_start(each, routed.router)
            if each.predictor.name is not None:
                predictor_arms(each, routed)
            routed.detach()
        if recipe.adapter is not None:
            check_targets(recipe.adapter.targets, backbone)
    data = build_data(recipe, backbone)
    data.check_shares(math.prod(distributed.device_counts(recipe.trainer)))
    with status(f"Reading {recipe.data.source} …"):
        data.prepare_data()
        data.setup()
    return backbone, data


def _check_start(recipe: Recipe, router: AnyRouter) -> None:
    """Raises RecipeError for a checkpoint to go on from where no training would read it."""
    if recipe.ckpt_path and not router.trainable:
        raise RecipeError(f"The router {recipe.router.name} is not trained; leave ckpt_path out.")
    if recipe.ckpt_path and trains_both(recipe, router):
        raise RecipeError(
            "adapter.joint=true trains router and adapter from the start; leave ckpt_path out, or set it to false."
        )


class Session:
    """One backbone and one text for all the routers of a recipe.

    Args:
        backbone: not routed yet.
        data: the text, set up.
    """

    def __init__(self, backbone: Backbone, data: TextData) -> None:
        self.backbone, self.data = backbone, data
        self._probe: CalibrationProbe | None = None
        self._watch: Stopwatch | None = None
        self._reference = Reference()

    def digests(self, recipe: Recipe) -> dict[str, str]:
        """Digests of what a run of the recipe is made from."""
        data = self.data
        return input_digests(
            recipe.router.name, self.backbone.fingerprint, data.fingerprint, data.train_fingerprint or ""
        )

    def stored(self, recipe: Recipe, place: RunFolder) -> list[Scores] | None:
        """The results of a complete run of the same recipe and inputs; None where there is none."""
        digests = self.digests(recipe)
        if not place.is_complete or place.differences(recipe, digests):
            return None
        place.warn_of_changed_code(digests)
        return scores_of(read_metrics(place.path))

    def run(self, recipe: Recipe, recipe_name: str, place: RunFolder, lent: Path | None = None) -> list[Scores]:
        """Fit, evaluate and complete one run.

        Args:
            lent: a complete run of the same recipe but for the adapter, whose router is taken as it is.
        """
        with on_disk(place.path), place.lock(), self.routed(recipe) as routed:
            folder = place.begin(recipe, recipe_name, self.digests(recipe), routed.geometry)
            watch, fitted = Stopwatch(folder), False
            self._watch = watch
            try:
                distributed.barrier()  # the others look into the folder from here on
                sizes = f"a batch of {recipe.data.batch_size} × {recipe.data.window} tokens"
                with within_memory(sizes, "set data.batch_size or data.window smaller, or objective.plans=2"):
                    before = 0.0 if lent is None else read_metrics(lent)["fit"]["seconds"]
                    self._fit(recipe, routed, folder, lent)
                    spent = {"seconds": before + watch.seconds, "parameters": _parameters(routed)}
                    watch.save()
                    fitted = True
                    predictor = fit_predictor(recipe, routed, self.data, folder)
                    if predictor is not None:
                        attach_predictor(recipe, routed, predictor)
                    scores = self._evaluate(recipe, routed)
                save_router(folder, routed.router.state_dict())
                if routed.adapter is not None:
                    routed.adapter.save(folder / ADAPTER)
                windows = self.data.test.fingerprint
                metrics = report.write_run_results(folder, recipe, scores, fit=spent, windows=windows)
                _tidy(folder)
                place.complete(metrics)
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    with suppress(BuddyError):
                        place.abandon()
                if not fitted and folder.exists():  # evaluation's time is not saved as fitting's
                    with suppress(BuddyError):  # on a full disk, say
                        watch.save()
                raise
        return scores

    def follow(self, recipes: Sequence[Recipe], places: Sequence[RunFolder]) -> None:
        """Take part in the training and evaluation of all routers beside the process that leads."""
        for recipe, place in zip(recipes, places, strict=True):
            if distributed.broadcast():  # it is finished
                continue
            with self.routed(recipe) as routed:
                distributed.barrier()
                try:
                    self._fit(recipe, routed, place.work)
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

    def _fit(self, recipe: Recipe, routed: RoutedLM, folder: Path, lent: Path | None = None) -> None:
        """Calibrate, train and heal."""
        self.data.train_seed = recipe.seed
        callbacks = [SaveSeconds(self._watch)] if self._watch else []
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
        if heals(recipe, routed.router):
            heal(recipe, routed, self.data, folder, callbacks)

    def _calibrate(self, recipe: Recipe, routed: RoutedLM) -> None:
        """Let the router measure: by all together where weights are shared out, else by the first process.

        Others follow where something may be left for training that is in no state; they find what it kept on disk.
        """
        with nullcontext() if is_sharded(recipe.trainer) else distributed.rank_zero_first():
            if distributed.is_global_zero() or is_sharded(recipe.trainer) or routed.router.trainable:
                probe = self._calibration(recipe, routed)
                routed.router.calibrate(probe)
                probe.release()
        distributed.broadcast_state(routed.router)

    def _calibration(self, recipe: Recipe, routed: RoutedLM) -> CalibrationProbe:
        """One probe for all routers: what one measured, the next need not."""
        if self._probe is None:
            windows, data = self.data.calibration.input_ids, recipe.data
            store = (
                None if is_sharded(recipe.trainer) else cache_folder("calibration")
            )  # all together: none may know more than another
            options: dict[str, Any] = {"prompt": data.prompt, "store": store}
            # One window at a time is quickest on a CPU, and searches that look at few windows pay for no others.
            size = 1 if self.backbone.device.type == "cpu" else data.batch_size
            self._probe = CalibrationProbe(routed, windows, size, self._track, **options)
        self._probe.seed = recipe.seed
        self._probe.serve(
            routed, [routed.executed_layers(budget) for budget in available_budgets(routed.router, recipe.budgets)]
        )
        return self._probe

    def _evaluate(self, recipe: Recipe, routed: RoutedLM) -> list[Scores]:
        """By all processes, with one and the same router and adapter."""
        for part in (routed.router, *([] if routed.adapter is None else [routed.adapter.parts])):
            distributed.broadcast_state(part)
        return evaluate(
            routed,
            self.data.test,
            available_budgets(routed.router, recipe.budgets),
            prompt=recipe.data.prompt,
            batch_size=recipe.data.batch_size,
            description=f"Evaluating {recipe.router.name}",
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
    forget(folder)
    remove_targets(folder)


def train(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, callbacks: Sequence[Callback] = ()) -> None:
    """Train the router in place, from `ckpt_path` or from what an interrupted run left in `folder`.

    Args:
        recipe: the whole run.
        routed: model and router, calibrated.
        data: the text, set up.
        folder: of the run that is being made.
        callbacks: Lightning's, beside those that keep checkpoints and show progress.

    Raises:
        TrainingError: a step was not finite, or the checkpoint cannot be used.
        KeyboardInterrupt: stopped in good order by a signal, with a checkpoint.
    """
    checkpoints = folder / "checkpoints"
    last = checkpoints / "last.ckpt"

    def failed(trainer: lightning.Trainer, error: NotFinite) -> TrainingError:
        kept = checkpoints / "before-failure.ckpt"
        trainer.save_checkpoint(kept)
        return TrainingError(f"{error}, and start anew or from the step before with ckpt_path={kept}.")

    line = ProgressLine(f"Training {recipe.router.name}")
    start = _start(recipe.ckpt_path, last)
    module = build_module(recipe, routed)
    module.mark_calibrated()
    run(recipe, module, data, last, start, line, callbacks, failed)


def run(
    recipe: Recipe,
    module: lightning.LightningModule,
    data: TextData,
    last: Path,
    start: str | Path | None,
    line: ProgressLine,
    callbacks: Sequence[Callback],
    failed: Callable[[lightning.Trainer, NotFinite], TrainingError],
) -> None:
    """Let Lightning train a module, with checkpoints, TensorBoard and a bar.

    Args:
        recipe: the whole run.
        module: what is trained.
        data: the text, set up.
        last: where its newest checkpoint is kept, in a folder of the run's folder.
        start: a checkpoint to go on from.
        line: shows progress.
        callbacks: Lightning's, beside these.
        failed: what to say where a step was not finite.

    Raises:
        TrainingError: a step was not finite, or the checkpoint cannot be used.
        KeyboardInterrupt: stopped in good order by a signal, with a checkpoint.
    """
    if start:
        check_checkpoint(start)
        errors.print(f"Going on from {start}", soft_wrap=True)
    stop, saver = GracefulStop(), LastCheckpoint(last, recipe.checkpoint_every)
    asked = [instantiate(spec) for spec in recipe.callbacks]
    shown = recipe.trainer.get("enable_progress_bar", True) and not any(isinstance(c, ProgressBar) for c in asked)
    with quiet():
        trainer = build_trainer(
            recipe,
            callbacks=[stop, *([line] if shown else []), *callbacks, *asked, saver],
            logger=instantiate(recipe.logger)
            if recipe.logger
            else TensorBoardLogger(last.parent.parent, name="", version="", default_hp_metric=False),
            plugins=[AtomicCheckpointIO()],
        )
        try:
            with distributed.lost_peers_reported():
                trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except NotFinite as error:
            raise _ended(failed(trainer, error), stop.requested) from error
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt if isinstance(error.__context__, KeyboardInterrupt) else error from None
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if start and not stop.began:  # it has the right parts, and something else in them
                raise unusable(start, f"{type(error).__name__}: {error}") from error
            raise
    if stop.requested:
        errors.print(f"A checkpoint of step {trainer.global_step} of {recipe.trainer['max_steps']} is kept.")
        raise KeyboardInterrupt


def _ended(sentence: TrainingError, interrupted: bool) -> BaseException:
    """What a training that did not stay finite ends with: the sentence, said at once where a signal came too.

    The interrupt is raised then, so that a caller who could go on after such a training does not.
    """
    if not interrupted:
        return sentence
    errors.print(str(sentence), soft_wrap=True)
    return KeyboardInterrupt()


def _start(asked: str | None, last: Path) -> str | Path | None:
    """What to go on from: the newest of an interrupted run, unless a checkpoint beside it is asked for by name."""
    named = asked is not None and Path(os.path.realpath(asked)).is_relative_to(os.path.realpath(last.parent))
    return last if last.exists() and not named else asked


CHECKPOINT = "healing.ckpt"


def heal(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, callbacks: Sequence[Callback] = ()) -> None:
    """Train an adapter for the router, or both where the recipe says so, and leave it on the model, frozen.

    Args:
        recipe: the whole run, with a section `adapter`.
        routed: model and router, calibrated, and trained unless both are trained together.
        data: the text, set up.
        folder: of the run that is being made; an interrupted healing goes on from the checkpoint there.
        callbacks: Lightning's, beside those that keep checkpoints and show progress.

    Raises:
        TrainingError: unknown target modules, a step that was not finite, or a checkpoint that cannot be used.
        KeyboardInterrupt: stopped in good order by a signal, with a checkpoint.
    """
    path = folder / "checkpoints" / CHECKPOINT
    routed.adapt(build_adapter(recipe, routed.backbone, routed.geometry.context_layer))
    routed.adapter.train()
    steps = replace(recipe, trainer={**recipe.trainer, "max_steps": recipe.adapter.steps})
    line = ProgressLine(f"Healing {recipe.router.name}", "heal/objective")

    def failed(_: Trainer, error: NotFinite) -> TrainingError:
        trained = folder / "checkpoints" / "last.ckpt"
        kept = f", and give ckpt_path={trained} to keep the router" if trained.exists() else ""
        return TrainingError(f"{error}; lower adapter.lr{kept}.")

    start = path if path.exists() else None
    run(steps, build_healing(recipe, routed, path), data, path, start, line, callbacks, failed)
    routed.adapter.freeze()
    routed.router.eval().requires_grad_(False)


def forget(folder: Path) -> None:
    """Remove the checkpoint, which is several times the adapter's size; the run is whole."""
    path = folder / "checkpoints" / CHECKPOINT
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
