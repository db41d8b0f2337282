"""One router's training by Lightning: from nothing or from a checkpoint, to the end or to a signal."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from buddy import distributed
from buddy.backbone.sharding import STRATEGY
from buddy.build import budgets_of
from buddy.config import Recipe
from buddy.console import errors
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.losses import Objective
from buddy.router import AnyRouter, LayerwiseRouter
from buddy.training.callbacks import Keeper, TrainingBar, WholeCheckpoints, quiet
from buddy.training.estimators import Estimator, Perturbed, StraightThrough, Weighted
from buddy.training.module import NotFinite, RoutingModule

NEEDED = ("state_dict", "global_step", "loops", "optimizer_states", "lr_schedulers")


def train(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, callbacks: Sequence[Callback] = ()) -> None:
    """Train the router in place, from `trainer.ckpt_path` or from what an interrupted run left in `folder`.

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
        return TrainingError(f"{error}, and start anew or from the step before with trainer.ckpt_path={kept}.")

    bar = TrainingBar(f"Training {recipe.router.name}")
    start = _start(recipe.trainer.ckpt_path, last)
    run(recipe, module_of(recipe, routed), data, last, start, bar, callbacks, failed)
    routed.router.to(routed.backbone.device)  # Lightning brings its module back to the CPU, not the backbone


def run(
    recipe: Recipe,
    module: lightning.LightningModule,
    data: TextData,
    last: Path,
    start: str | Path | None,
    bar: TrainingBar,
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
        bar: shows progress.
        callbacks: Lightning's, beside these.
        failed: what to say where a step was not finite.

    Raises:
        TrainingError: a step was not finite, or the checkpoint cannot be used.
        KeyboardInterrupt: stopped in good order by a signal, with a checkpoint.
    """
    if start:
        check_checkpoint(start)
        errors.print(f"Going on from {start}", soft_wrap=True)
    keeper = Keeper(last, recipe.trainer.checkpoint_every)
    with quiet(), keeper.listening():
        trainer = trainer_of(
            recipe,
            callbacks=[keeper, bar, *callbacks],
            logger=TensorBoardLogger(last.parent.parent, name="", version="", default_hp_metric=False),
            log_every_n_steps=recipe.trainer.log_every,
            plugins=[WholeCheckpoints()],
        )
        try:
            with distributed.linked():
                trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except NotFinite as error:
            raise _ended(failed(trainer, error), keeper.asked) from error
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if start and not keeper.began:  # it has the right parts, and something else in them
                raise _unusable(start, f"{type(error).__name__}: {error}") from error
            raise
    if keeper.asked:
        errors.print(f"A checkpoint of step {trainer.global_step} of {recipe.trainer.max_steps} is kept.")
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


def trainer_of(recipe: Recipe, **options: Any) -> lightning.Trainer:
    """Lightning's trainer with the settings of a recipe.

    Raises:
        TrainingError: it refuses them.
    """
    section = recipe.trainer
    if any(way in section.strategy for way in ("spawn", "fork", "notebook")):
        raise TrainingError(
            f"trainer.strategy={section.strategy} cannot carry a routed model to its processes; choose ddp instead."
        )
    devices, nodes = distributed.shape(section)
    shared_out = "ddp" if devices * nodes > 1 else "auto"  # the weights; the router is whole on each device
    try:
        return lightning.Trainer(
            max_steps=section.max_steps,
            max_epochs=-1,
            accelerator=section.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=shared_out if section.strategy == STRATEGY else section.strategy,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic="warn",
            **options,
        )
    except Exception as error:  # only settings are looked at here, and they are refused with many kinds of error
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        raise TrainingError(
            f"trainer.accelerator={section.accelerator}, devices={devices} and strategy={section.strategy} do "
            f"not work here ({reason}); change them."
        ) from error


def check_checkpoint(path: str | Path) -> None:
    """Raises TrainingError unless the file is a whole checkpoint of a training; what is pickled in it is not run."""
    if not os.path.isfile(path):
        raise TrainingError(f"There is no checkpoint {path}; leave trainer.ckpt_path out or name an existing file.")
    try:
        missing = {*NEEDED} - {*torch.load(path, map_location="cpu", weights_only=True)}
        with zipfile.ZipFile(path) as parts:  # torch itself does not look at the sums
            missing = missing or {name for name in [parts.testzip()] if name}
    except Exception as error:  # cut, overwritten and foreign files show as a dozen kinds of error
        missing = {type(error).__name__}
    if missing:
        raise _unusable(path, ", ".join(sorted(missing)))


def _unusable(path: str | Path, reason: str) -> TrainingError:
    return TrainingError(
        f"The checkpoint {path} is damaged or not one of Buddy's ({shorten(reason, 200, placeholder=' …')}); delete it "
        "and start anew, or name another as trainer.ckpt_path."
    )


def estimator_of(recipe: Recipe, router: AnyRouter) -> Estimator:
    """The recipe's estimator with its objective; a layerwise router has a way of its own."""
    section = recipe.objective
    objective = Objective(section.kl, section.ce)
    if isinstance(router, LayerwiseRouter):
        return Weighted(objective)
    if section.estimator == "perturbed":
        return Perturbed(objective, section.plans, section.sigma, section.shared)
    return StraightThrough(objective)


def module_of(recipe: Recipe, routed: RoutedLM) -> RoutingModule:
    """The LightningModule for a recipe."""
    optimizer = recipe.optimizer
    return RoutingModule(
        routed,
        estimator_of(recipe, routed.router),
        [routed.executed_layers(budget) for budget in budgets_of(recipe, routed)],
        prompt=recipe.data.prompt,
        lr=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        seed=recipe.seed,
    )
