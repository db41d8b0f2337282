"""One router's healing by Lightning: from nothing or from a checkpoint, to the end or to a signal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from buddy.build import adapter_of, budgets_of
from buddy.config import Recipe
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.losses import Objective
from buddy.router import AnyRouter
from buddy.training.callbacks import TrainingBar
from buddy.training.healing import HealingModule, Together
from buddy.training.module import NotFinite
from buddy.training.train import estimator_of, run

CHECKPOINT = "healing.ckpt"
CHANGEABLE = {"kind", "lr", "rates", "steps"}  # of the section, from one beginning to the next


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
    routed.adapt(adapter_of(recipe, routed.backbone, routed.geometry.context_layer))
    routed.adapter.train()
    steps = replace(recipe, trainer=replace(recipe.trainer, max_steps=recipe.adapter.steps))
    bar = TrainingBar(f"Healing {recipe.router.name}", "heal/objective")

    def failed(_: Trainer, error: NotFinite) -> TrainingError:
        trained = folder / "checkpoints" / "last.ckpt"
        kept = f", and give trainer.ckpt_path={trained} to keep the router" if trained.exists() else ""
        return TrainingError(f"{error}; lower adapter.lr{kept}.")

    start = path if path.exists() else None
    run(steps, healing_module_of(recipe, routed, path), data, path, start, bar, callbacks, failed)
    routed.router.to(routed.backbone.device)
    routed.adapter.freeze()
    routed.router.eval().requires_grad_(False)


def forget(folder: Path) -> None:
    """Remove the checkpoint, which is several times the adapter's size; the run is whole."""
    path = folder / "checkpoints" / CHECKPOINT
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def trains_both(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether healing trains the router too."""
    return recipe.adapter is not None and recipe.adapter.joint and router.trainable


def healing_module_of(recipe: Recipe, routed: RoutedLM, checkpoint: Path) -> HealingModule:
    """The LightningModule of a recipe's healing, with the place of its checkpoint."""
    optimizer, both = recipe.optimizer, trains_both(recipe, routed.router)
    return HealingModule(
        routed,
        Objective(recipe.objective.kl, recipe.objective.ce),
        [routed.executed_layers(budget) for budget in budgets_of(recipe, routed)],
        prompt=recipe.data.prompt,
        lr=recipe.adapter.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        seed=recipe.seed,
        identity=identity_of(recipe, routed.router),
        checkpoint=str(checkpoint),
        together=Together(estimator_of(recipe, routed.router), optimizer.lr) if both else None,
    )


def identity_of(recipe: Recipe, router: AnyRouter) -> dict[str, str]:
    """What an interrupted healing must have been begun with, so that going on makes sense."""
    settings = {f"adapter.{key}": str(value) for key, value in asdict(recipe.adapter).items() if key not in CHANGEABLE}
    digest = hashlib.sha256()
    for name, tensor in sorted(router.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return {**settings, "the router": digest.hexdigest()[:16]}
