"""One run: calibrate, train and heal a router, fit its budget predictor, evaluate it, and save all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from buddy import distributed
from buddy.backbone.adapter import Adapter
from buddy.backbone.load import Backbone
from buddy.backbone.sharding import check_sharding, finish_sharding, is_sharded, join, shard
from buddy.builders.data import build_data
from buddy.builders.model import build_backbone, build_model, build_router, counts_of, restore, uses_bridges
from buddy.builders.training import (
    build_healing,
    build_module,
    build_trainer,
    check_model,
    healing_steps,
    ignored_keys,
    instantiate,
    trains_both,
)
from buddy.calibration.bridges import fit_bridges
from buddy.calibration.probe import CalibrationProbe
from buddy.console import quiet, status, stderr, track
from buddy.data.module import TextData
from buddy.data.windows import Windows
from buddy.engine.bridges import Bridges
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, RecipeError, TrainingError, described, did_you_mean
from buddy.evaluation.evaluate import evaluate
from buddy.evaluation.figures import draw_run
from buddy.io import cache_folder, checksum, on_disk, out_of_memory, within_memory, write_bytes
from buddy.measurements import Measurements
from buddy.metrics.perplexity import MAX_STATE_BYTES, Reference, Scores, with_documents
from buddy.predictor.train import fit_predictor
from buddy.provenance import CODE, check_fixed, code_digest
from buddy.registry import load
from buddy.router import AnyRouter, LayerwiseRouter, available_budgets
from buddy.run import RunSpec, read_run
from buddy.run_files import (
    ADAPTER,
    BRIDGE,
    CHECKPOINTS,
    FITTED,
    HEALING,
    LAST,
    is_fitted,
    read_metrics,
    save_router,
    seal_fitted,
    seconds_in,
    timed,
)
from buddy.schema import ClassSpec, Recipe
from buddy.training.callbacks import (
    AtomicCheckpointIO,
    LastCheckpoint,
    ProgressLine,
    has_ended,
    interrupts,
    read_checkpoint,
    unusable,
)

TRAINED_STATES = 2**28  # bytes of the dense model's hidden states that trainings of bridges on equal windows share
MEMORY = "set data.batch_size or data.window smaller"


class Session:
    """One backbone and one text for all the runs of a command.

    Args:
        backbone: without a router.
        data: the text, set up.
    """

    def __init__(self, backbone: Backbone, data: TextData) -> None:
        self.backbone, self.data = backbone, data
        self._measured: dict[tuple[Any, ...], Measurements] = {}
        self._reference, self._trained_reference = Reference(MAX_STATE_BYTES), Reference(TRAINED_STATES)

    @classmethod
    def prepare(cls, recipes: Sequence[Recipe], labels: Sequence[str] = ()) -> Session:
        """Load backbone and text, and find every mistake in the recipes before anything is written.

        Args:
            recipes: the same except for the router, its overrides and the seed.
            labels: of the recipes, which mistakes are reported with where there are several.

        Raises:
            BuddyError: a recipe cannot be fitted.
        """
        recipe = recipes[-1]
        for each in recipes:
            load(each.router.name)
            with quiet():
                build_trainer(each, logger=False)
            check_sharding(each)
        for spec in recipe.callbacks:
            _check_callback(recipe, spec, instantiate(spec, Callback))
        if recipe.logger:
            instantiate(recipe.logger, Logger)
        if recipe.ckpt_path:
            _check_start(recipe, recipe.ckpt_path)
        with status(f"Loading {recipe.backbone.name} …"):
            backbone = build_backbone(recipe, on_cpu=is_sharded(recipe.trainer))
            for each, label in zip(recipes, labels if len({*labels}) > 1 else [""] * len(recipes), strict=True):
                try:
                    check_model(each, backbone)
                except BuddyError as error:
                    error.args = (f"{label}: {error}" if label else str(error),)
                    raise
        data = build_data(recipe, backbone)
        devices = math.prod(distributed.device_counts(recipe.trainer))
        data.check_shares(devices)
        with status(f"Reading {recipe.data.source} …"):
            data.setup()
        for each in recipes:
            _check_limits(each, data, devices)
        for name, (found, wanted) in data.shortfall.items():
            stderr.print(f"{recipe.data.source} gives {found} of the {wanted} {name} windows that the recipe asks for.")
        return cls(backbone, data)

    @classmethod
    def launch(cls, specs: Sequence[RunSpec], recipe: Recipe) -> Session:
        """`prepare`, then start the other processes of `trainer.devices`, and shard the backbone if that is asked for.

        Args:
            specs: the runs to be made.
            recipe: that all of them come from, with its rivals.

        Raises:
            RecipeError: the settings are not those that the recipe fixed.
            RunError: another process makes one of the runs.
        """
        first, trainer = distributed.is_global_zero(), specs[-1].recipe.trainer
        if not first or distributed.torchrun_world_size() > 1:
            join(trainer)  # all processes exist already
        with distributed.one_by_one(trainer) if is_sharded(trainer) else distributed.rank_zero_first():
            session = cls.prepare([spec.recipe for spec in specs], [spec.label for spec in specs])
            check_fixed(recipe, recipe.rivals, session.digests(recipe))  # before a folder is made
            for spec in specs if first else ():
                spec.run_folder.check_free()
                with spec.run_folder.lock():  # a second command is refused here, before it does anything
                    pass
            join(trainer)
            if is_sharded(trainer):
                shard(session.backbone, trainer["accelerator"])
        if is_sharded(trainer):
            finish_sharding(session.backbone)
        return session

    def digests(self, recipe: Recipe, folder: Path | None = None) -> dict[str, str]:
        """Digests of the inputs of a run of the recipe, but for a checkpoint in the run's own folder."""
        data, backbone = self.data, self.backbone
        texts = {"text": data.fingerprint, "training text": data.train_fingerprint, "tokens": data.tokens_digest}
        digests = {"model": backbone.fingerprint, "details": backbone.details, **texts}
        start = Path(recipe.ckpt_path).resolve() if recipe.ckpt_path else None
        if start and not (folder and start.is_relative_to(folder.resolve())):
            digests["checkpoint"] = checksum(start)
        return {name: digest for name, digest in digests.items() if digest} | {
            CODE: code_digest(load(recipe.router.name))
        }

    def differences(self, spec: RunSpec) -> list[str]:
        """Why the run in the folder, complete or begun, is not this one; empty if it is, or if there is none."""
        ignored = self._ignored(spec, build_router(spec.recipe, self.backbone))
        return spec.run_folder.differences(spec.recipe, self.digests(spec.recipe, spec.folder), ignore=ignored)

    @staticmethod
    def _ignored(spec: RunSpec, router: AnyRouter) -> tuple[str, ...]:
        """Beginnings of the recipe's keys that may differ in the folder of a run."""
        return (*spec.ignored_keys, *ignored_keys(spec.recipe, router))

    def fit(self, spec: RunSpec) -> None:
        """Make the run, or resume it; in the first process.

        Raises:
            BuddyError: the run cannot be made. A checkpoint, if there is one, stays.
            KeyboardInterrupt: stopped after a step, with a checkpoint.
        """
        recipe, run_folder = spec.recipe, spec.run_folder
        with on_disk(spec.folder), run_folder.lock(), self.model(recipe) as model:
            digests = self.digests(recipe, spec.folder)
            folder = run_folder.begin(
                recipe, spec.recipe_name, digests, model.geometry, ignore=self._ignored(spec, model.router)
            )
            try:
                distributed.barrier()  # the other processes read the folder from here on
                with within_memory(f"a batch of {recipe.data.batch_size} × {recipe.data.window} tokens", MEMORY):
                    before = read_metrics(spec.reuse_from)["fit"]["seconds"] if spec.reuse_from else 0.0
                    with timed(folder):
                        self._fit(recipe, model, folder, spec.reuse_from)
                    added = sum(part.size for part in (model.bridges, model.adapter) if part is not None)
                    weights = added + sum(parameter.numel() for parameter in model.router.parameters())
                    cost = {"seconds": before + seconds_in(folder), "parameters": weights}
                    fit_predictor(recipe, model, self.data, folder)
                    scores = self._test(recipe, model)
                self._keep(model, folder)
                if model.adapter is not None:
                    model.adapter.save(folder / ADAPTER)
                draw_run(folder, scores)
                data = self.data
                about = {"fit": cost, "windows": data.evaluated.fingerprint, "texts": data.text_digests}
                run_folder.complete(with_documents(scores) | about)
            except Exception as error:
                with suppress(BuddyError):  # the disk may be full
                    run_folder.abandon()
                if isinstance(error, BuddyError):
                    raise
                raise spec.unexpected(error) from error

    def follow(self, spec: RunSpec) -> None:
        """Take part in the run as another process than the first."""
        with self.model(spec.recipe) as model:
            distributed.barrier()
            try:
                self._fit(spec.recipe, model, spec.run_folder.work, spec.reuse_from)
                self._test(spec.recipe, model)
            except (TrainingError, KeyboardInterrupt) as error:
                raise SystemExit(2) from error

    @contextmanager
    def model(self, recipe: Recipe) -> Iterator[RoutedLM]:
        """The backbone with the recipe's router, whose initial weights depend on the seed."""
        lightning.seed_everything(recipe.seed, verbose=False)
        model = build_model(recipe, self.backbone)
        try:
            yield model
        finally:
            model.detach()

    def evaluate(self, recipe: Recipe, model: RoutedLM, windows: Windows, description: str) -> list[Scores]:
        """Scores of a fitted model on windows, at the recipe's budgets."""
        budgets, data = available_budgets(model.router, recipe.budgets), recipe.data
        options: dict[str, Any] = {"prompt": data.prompt, "batch_size": data.batch_size, "reference": self._reference}
        return evaluate(model, windows, budgets, **options, description=description)

    def _fit(self, recipe: Recipe, model: RoutedLM, folder: Path, reuse_from: Path | None) -> None:
        """Calibrate, train and heal; bridges are fitted on the router's plans before its training and after it."""
        self.data.train_seed = recipe.seed
        steps = healing_steps(recipe, model.router)  # the router is frozen later
        checkpoint = folder / CHECKPOINTS / LAST
        fitted = folder / CHECKPOINTS / FITTED
        router_is_fitted = distributed.broadcast(distributed.is_global_zero() and is_fitted(fitted))
        if router_is_fitted:  # the run was stopped after that
            restore(model, recipe, fitted, adapter=False)
        elif reuse_from is not None:
            restore(model, recipe, reuse_from, adapter=False)
            if model.bridges is not None and read_run(reuse_from).recipe.bridge.steps:
                self._fit_bridges(recipe, model)  # from the closed form, not from bridges that were trained there
            checkpoint.unlink(missing_ok=True)  # of a router that was begun here before
            self._keep_fitted(model, fitted)
        else:
            self._calibrate(recipe, model)
            both = trains_both(recipe, model.router)
            alone = model.router.trainable and not both and recipe.trainer["max_steps"] > 0
            untrained_gates = isinstance(model.router, LayerwiseRouter) and (alone or both)
            self._fit_bridges(recipe, model, planned=not untrained_gates)
            if alone:
                _train(recipe, model, self.data, checkpoint)
                if recipe.bridge and recipe.bridge.joint:
                    model.bridge(model.bridges)  # as trained
                else:
                    self._fit_bridges(recipe, model)
            if not both:
                model.router.eval().requires_grad_(False)
                self._keep_fitted(model, fitted)
        bridged = model.bridges is not None and bool(model.bridges.fitted.any())
        if steps and (recipe.adapter or bridged):
            healed = replace(recipe, trainer={**recipe.trainer, "max_steps": steps})
            healing = folder / CHECKPOINTS / HEALING
            _heal(healed, model, self.data, healing, self._trained_reference)

    @staticmethod
    def _keep(model: RoutedLM, folder: Path) -> None:
        """Write bridges and router."""
        if distributed.is_global_zero():
            folder.mkdir(parents=True, exist_ok=True)
            if model.bridges is not None:
                model.bridges.save(folder / BRIDGE)
            save_router(folder, model.router.state_dict())

    def _keep_fitted(self, model: RoutedLM, folder: Path) -> None:
        """Write what comes before healing, which can then resume."""
        self._keep(model, folder)
        if distributed.is_global_zero():
            seal_fitted(folder)

    def _calibrate(self, recipe: Recipe, model: RoutedLM) -> None:
        """Let the router measure what it needs, or read it from disk: in all processes if the backbone is sharded."""
        if distributed.is_global_zero() or is_sharded(recipe.trainer):
            model.router.calibrate(self._probe(recipe, model))
            self._check_state(recipe, model)
        distributed.broadcast_state(model.router)

    def _check_state(self, recipe: Recipe, model: RoutedLM) -> None:
        """Raise TrainingError where a saved router would plan otherwise than this one: a part of it is not saved."""
        name, advice = recipe.router.name, "keep what calibrate finds in buffers, which `buddy routers check` tests."
        below = [count for count in counts_of(recipe, model).values() if count < model.geometry.layers]
        modes = {module: module.training for module in model.router.modules()}
        plan = self._planned(recipe, model, model.router, min(below)) if below else None
        for module, training in modes.items():
            module.training = training
        try:
            with isolate_rng():
                copy = build_router(recipe, self.backbone).to(self.backbone.device)
            copy.load_state_dict(model.router.state_dict())
            same = plan is None or torch.equal(plan, self._planned(recipe, model, copy, min(below)))
        except Exception as error:  # the router may be third-party code
            if out_of_memory(error):
                raise
            raise TrainingError(f"A saved copy of router {name} fails ({described(error)}); {advice}") from error
        if not same:
            raise TrainingError(f"A saved copy of router {name} plans otherwise than the router; {advice}")

    @torch.no_grad()
    def _planned(self, recipe: Recipe, model: RoutedLM, router: AnyRouter, count: int) -> Tensor:
        """(1, W, L) bool: the plans of a router for a calibration window at K = `count`."""
        window = self.data.calibration.input_ids[:1].to(self.backbone.device)
        with model.changed(router.eval()), isolate_rng():
            torch.manual_seed(0)
            return model(window, executed=torch.tensor([count]), prompt=recipe.data.prompt, logits_to_keep=1).runs

    def _fit_bridges(self, recipe: Recipe, model: RoutedLM, planned: bool = True) -> None:
        """Fit the bridges on the plans that the router makes now, at all budgets below full depth.

        Args:
            recipe: of the run.
            model: with its router.
            planned: False for bridges of all layers on the dense model's states. Gates that are not trained yet are
                open, and the exact count then skips the last layers, which is no plan to learn with.
        """
        executed = [
            count for count in dict.fromkeys(counts_of(recipe, model).values()) if count < model.geometry.layers
        ]
        if not uses_bridges(recipe, model.router):
            return
        if executed and not planned:
            executed = [model.geometry.layers]
        section, fitted = recipe.bridge, Bridges(model.geometry, recipe.bridge.rank)
        if executed and (distributed.is_global_zero() or is_sharded(recipe.trainer)):
            fitted = fit_bridges(
                model,
                self.data.calibration.input_ids[: section.windows],
                executed,
                rank=section.rank,
                ridge=section.ridge,
                prompt=recipe.data.prompt,
                batch_size=recipe.data.batch_size,
                track=track,
            )
        distributed.broadcast_state(fitted)
        if executed and distributed.is_global_zero() and not fitted.fitted.any():
            stderr.print(f"No bridges: the windows that fit them have fewer than {model.geometry.hidden} tokens.")
        model.bridge(fitted)

    def _probe(self, recipe: Recipe, model: RoutedLM) -> CalibrationProbe:
        """A probe that shares its values with those of all routers with the same routing."""
        # Under sharding all processes must measure the same, so none may find values on disk.
        store = None if is_sharded(recipe.trainer) else cache_folder("calibration")
        # One window at a time is fastest on a CPU, and a search on few windows then measures no others.
        size = 1 if self.backbone.device.type == "cpu" else recipe.data.batch_size
        key = (model.geometry, model.sink_tokens)
        probe = CalibrationProbe(
            model,
            self.data.calibration.input_ids,
            size,
            track,
            layer_counts=counts_of(recipe, model).values(),
            seed=recipe.seed,
            prompt=recipe.data.prompt,
            store=store,
            bridge=None if recipe.bridge is None else {"rank": recipe.bridge.rank, "ridge": recipe.bridge.ridge},
            measured=self._measured.get(key),
        )
        self._measured[key] = probe.measured
        return probe

    def _test(self, recipe: Recipe, model: RoutedLM) -> list[Scores]:
        """Scores on the recipe's test or validation windows, by all processes with the same weights."""
        adapted = None if model.adapter is None else model.adapter.parts
        for part in filter(None, (model.router, model.bridges, adapted)):
            distributed.broadcast_state(part)
        return self.evaluate(recipe, model, self.data.evaluated, f"Evaluating {recipe.router.name}")


def _check_start(recipe: Recipe, path: str) -> None:
    """Raises TrainingError where `ckpt_path` names no checkpoint, or one of more steps than the recipe takes."""
    done, steps = read_checkpoint(path)["global_step"], recipe.trainer["max_steps"]
    if steps < done:
        raise TrainingError(
            f"The checkpoint {path} is of step {done}, and trainer.max_steps is {steps}; set that to {done} or more."
        )


def _check_limits(recipe: Recipe, data: TextData, devices: int) -> None:
    """Raises RecipeError where a share of the validation batches is none, which Lightning refuses after calibration."""
    batches = -(-len(data.validation) // (data.batch_size * devices))
    name = "overfit_batches" if recipe.trainer.get("overfit_batches") else "limit_val_batches"
    share = recipe.trainer.get(name)
    if isinstance(share, float) and 0 < share * batches < 1:
        raise RecipeError(f"trainer.{name}={share} takes less than one of {batches} batches; raise it.")


def _check_callback(recipe: Recipe, spec: ClassSpec, callback: Any) -> None:
    """Raises RecipeError where a callback changes `data.batch_size`, or monitors a result that no validation has."""
    if isinstance(callback, BatchSizeFinder):
        raise RecipeError(f"{spec.class_path} changes the batches of all routers that follow; set data.batch_size.")
    monitor = str(getattr(callback, "monitor", None))
    each = [f"val/{name}/{budget}" for budget in recipe.budgets for name in ("kl", "loss", "perplexity")]
    known = ["val/kl", "val/loss", *each]
    if monitor.startswith("val/") and monitor not in known:
        advice = did_you_mean(monitor, known) or "; choose val/kl."
        raise RecipeError(f"{spec.class_path} monitors {monitor}, which no validation measures{advice}")


def _train(recipe: Recipe, model: RoutedLM, data: TextData, checkpoint: Path) -> None:
    """Train the calibrated router in place, from the run's own checkpoint or else from `ckpt_path`."""
    start = checkpoint if checkpoint.exists() else recipe.ckpt_path
    module = build_module(recipe, model)
    module.mark_calibrated()
    _run_trainer(recipe, module, data, checkpoint, start, ProgressLine(f"Training {recipe.router.name}"))
    if start and distributed.is_global_zero() and not checkpoint.exists():  # `ckpt_path` had all steps
        checkpoint.parent.mkdir(exist_ok=True)
        write_bytes(checkpoint, Path(start).read_bytes())


def _heal(recipe: Recipe, model: RoutedLM, data: TextData, checkpoint: Path, reference: Reference) -> None:
    """Train adapter and bridges under the router's plans, with the router if the recipe says so; then freeze them."""
    if recipe.adapter is not None:
        context_layer = model.geometry.context_layer
        model.adapter = Adapter.new(model.backbone, recipe.adapter, first=context_layer, seed=recipe.seed)
        model.adapter.train()

    start = checkpoint if checkpoint.exists() else None
    activity = "Training the bridges of" if recipe.adapter is None else "Healing"
    line = ProgressLine(f"{activity} {recipe.router.name}", "heal/objective")
    module = build_healing(recipe, model, reference)
    _run_trainer(recipe, module, data, checkpoint, start, line)
    if model.adapter is not None:
        model.adapter.freeze()
    model.bridge(model.bridges)
    model.router.eval().requires_grad_(False)


def _run_trainer(
    recipe: Recipe,
    module: lightning.LightningModule,
    data: TextData,
    checkpoint: Path,
    start: str | Path | None,
    line: ProgressLine,
) -> None:
    """`Trainer.fit` with the recipe's callbacks and logger; keeps `checkpoint` up to date and resumes from `start`.

    Raises:
        TrainingError: a step was not finite, or the checkpoint cannot be used.
        KeyboardInterrupt: stopped after a step by a signal, with a checkpoint.
    """
    trained, steps = recipe, recipe.trainer["max_steps"]
    if start:
        content = read_checkpoint(start)
        # With `ckpt_path` a recipe may go on from its own folder, where another recipe has ended.
        named = recipe.ckpt_path and Path(recipe.ckpt_path).resolve() == checkpoint.resolve()
        if start == checkpoint and not named and has_ended(content):
            trained = replace(recipe, trainer={**recipe.trainer, "max_steps": content["global_step"]})  # no more
        stderr.print(f"Resuming from {start}")
    stop = LastCheckpoint(checkpoint, recipe.checkpoint_every)
    own = [instantiate(each, Callback) for each in recipe.callbacks]
    # What a callback monitors is logged by one of the two trainings, or by both, as val/kl is.
    other = {"train/", "heal/"} - {f"{module.prefix}/"}
    own = [each for each in own if not str(getattr(each, "monitor", None)).startswith(tuple(other))]
    shown, bars = recipe.trainer.get("enable_progress_bar", True), any(isinstance(each, ProgressBar) for each in own)
    own[:0] = [line] if shown and not bars else []
    tensorboard = TensorBoardLogger(checkpoint.parent.parent, name="", version="", default_hp_metric=False)
    with quiet():
        trainer = build_trainer(
            trained,
            callbacks=[*own, stop],
            logger=instantiate(recipe.logger, Logger) if recipe.logger else tensorboard,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=shown and bars,
            default_root_dir=checkpoint.parent.parent,
        )
        try:
            with distributed.lost_peers_reported(), interrupts(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except TrainingError as error:
            if stop.requested:  # a comparison must not go on with its next run
                stderr.print(str(error))
                raise KeyboardInterrupt from error
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            # Before the first step the fault is the checkpoint's: it has the right parts, with other content.
            if start and not stop.began and not out_of_memory(error):
                raise unusable(start, described(error)) from error
            raise
    if stop.requested:
        stderr.print(f"Saved a checkpoint of step {trainer.global_step} of {steps}.")
        raise KeyboardInterrupt
