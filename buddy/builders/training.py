"""Recipe → estimator, LightningModules and trainer; checks that need the model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from buddy import distributed
from buddy.backbone.adapter import check_targets
from buddy.backbone.load import Backbone
from buddy.backbone.sharding import STRATEGY
from buddy.builders.model import build_model, check_mean, counts_of
from buddy.engine.model import RoutedLM
from buddy.errors import RecipeError, TrainingError, described, reason
from buddy.losses import Objective
from buddy.metrics.perplexity import Reference
from buddy.predictor.train import predictor_arms
from buddy.provenance import ESTIMATOR_KEYS, TRAINING_KEYS
from buddy.router import AnyRouter, LayerwiseRouter, available_budgets
from buddy.schema import ClassSpec, Recipe
from buddy.training.estimators import Estimator, Perturbed, StraightThrough, estimator_for
from buddy.training.healing import HealingModule
from buddy.training.module import RoutingModule

VALIDATIONS, APART = 4, 25  # in a training by default: at most so many, at least so many steps apart
TRAINER: dict[str, Any] = {  # defaults of Buddy's trainers
    "max_epochs": -1,
    "enable_model_summary": False,
    "deterministic": "warn",
    "inference_mode": False,  # training cannot use its tensors
    "num_sanity_val_steps": 0,
}


def check_model(recipe: Recipe, backbone: Backbone) -> None:
    """Raises a BuddyError for a router, estimator, predictor, adapter or checkpoint that does not fit the recipe."""
    model = build_model(recipe, backbone)
    over = recipe.routing.mean_over
    try:
        check_mean(model)
        if model.router.trainable:
            if recipe.trainer["max_steps"] and min(counts_of(recipe, model).values()) == model.geometry.layers:
                raise RecipeError("budgets has none below full depth, so nothing can be learned; add one, such as 0.5.")
            estimator = build_estimator(recipe, model.router)
            if isinstance(estimator, StraightThrough) and model.settings.policy != "fill":
                raise RecipeError(
                    f"objective.estimator={recipe.objective.estimator} computes every layer, which needs "
                    f"routing.policy=fill, not {model.settings.policy}; set that, or objective.estimator=perturbed."
                )
            trained = recipe.trainer["max_steps"] or trains_both(recipe, model.router)
            if isinstance(estimator, Perturbed) and model.settings.competing > 1 and trained:
                raise RecipeError(
                    f"objective.estimator={recipe.objective.estimator} credits each token alone, and with "
                    f"routing.mean_over={over} tokens compete; set objective.estimator=surrogate."
                )
            if recipe.bridge and recipe.bridge.joint and not getattr(estimator, "backpropagates", False):
                raise RecipeError(
                    f"bridge.joint=true needs an estimator that back-propagates, not {recipe.objective.estimator}; "
                    "set objective.estimator=surrogate."
                )
        if recipe.ckpt_path and not model.router.trainable:
            raise RecipeError(f"The router {recipe.router.name} is not trained; leave ckpt_path out.")
        if recipe.ckpt_path and trains_both(recipe, model.router):
            raise RecipeError(
                "adapter.joint=true trains router and adapter from the start; leave ckpt_path out, or set it to false."
            )
        if recipe.predictor.name is not None:
            predictor_arms(recipe, model)
    finally:
        model.detach()
    if recipe.bridge is not None and recipe.bridge.rank > backbone.hidden_size:
        raise RecipeError(
            f"bridge.rank is {recipe.bridge.rank}, but the hidden states of {backbone.name} have "
            f"{backbone.hidden_size} numbers; set it to that or less."
        )
    if recipe.adapter is not None:
        check_targets(recipe.adapter.targets, backbone)


def healing_steps(recipe: Recipe, router: AnyRouter) -> int:
    """Steps that train an adapter, the bridges or both under a router's plans; 0 for a router that skips nothing.

    With `bridge.joint` the steps that train a router train its bridges too; for a router that is not trained,
    trainer.max_steps is added here instead.

    Args:
        recipe: of the run.
        router: before its training, since it is frozen afterwards.
    """
    adapter, bridge = recipe.adapter, recipe.bridge
    if router.full_depth or not (adapter or bridge):
        return 0
    if adapter:
        return adapter.steps
    return bridge.steps + (recipe.trainer["max_steps"] if bridge.joint and not router.trainable else 0)


def trains_both(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether healing trains the router too."""
    return recipe.adapter is not None and recipe.adapter.joint and router.trainable


def ignored_keys(recipe: Recipe, router: AnyRouter) -> tuple[str, ...]:
    """Beginnings of a recipe's keys that change nothing in a run of a router, given before its training."""
    estimated = router.trainable and not isinstance(router, LayerwiseRouter)  # its gates have their own estimator
    # A predictor measures losses on windows of the training text.
    trained = router.trainable or healing_steps(recipe, router) > 0 or recipe.predictor.name is not None
    return (*(() if estimated else ESTIMATOR_KEYS), *(() if trained else TRAINING_KEYS))


def build_estimator(recipe: Recipe, router: AnyRouter) -> Estimator:
    """The recipe's estimator with its objective; layerwise routers have their own.

    Raises:
        RegistryError: the estimator is unknown.
    """
    section = recipe.objective
    return estimator_for(router, section.estimator, Objective(section.kl, section.ce), asdict(section))


def build_module(recipe: Recipe, routed: RoutedLM) -> RoutingModule:
    """The LightningModule that trains a recipe's router."""
    return RoutingModule(
        routed,
        budgets=available_budgets(routed.router, recipe.budgets),
        estimator=build_estimator(recipe, routed.router),
        bridge_lr=recipe.bridge.lr if recipe.bridge and recipe.bridge.joint else 0.0,
        prompt=recipe.data.prompt,
        seed=recipe.seed,
        **asdict(recipe.optimizer),
    )


def build_healing(recipe: Recipe, routed: RoutedLM, reference: Reference | None = None) -> HealingModule:
    """The LightningModule that trains a recipe's adapter, its bridges, or both.

    Args:
        reference: shares the dense model's results with the trainings of other routers on the same windows.
    """
    optimizer, both, bridge = recipe.optimizer, trains_both(recipe, routed.router), recipe.bridge
    return HealingModule(
        routed,
        budgets=available_budgets(routed.router, recipe.budgets),
        objective=Objective(recipe.objective.kl, recipe.objective.ce),
        prompt=recipe.data.prompt,
        lr=recipe.adapter.lr if recipe.adapter else 0.0,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        seed=recipe.seed,
        estimator=build_estimator(recipe, routed.router) if both else None,
        router_lr=optimizer.lr,
        bridge_lr=bridge.lr if bridge and (bridge.steps or bridge.joint or not recipe.adapter) else 0.0,
        reference=reference,
    )


def build_trainer(recipe: Recipe, **options: Any) -> lightning.Trainer:
    """Lightning's trainer with the keywords of a recipe, overridden by `options`.

    Raises:
        TrainingError: Lightning refuses them.
    """
    keywords = recipe.trainer
    strategy = keywords["strategy"]
    if any(way in str(strategy) for way in ("spawn", "fork", "notebook")):
        raise TrainingError(f"trainer.strategy={strategy} cannot start processes for a routed model; set it to ddp.")
    devices, nodes = distributed.device_counts(keywords)
    if strategy == STRATEGY:  # `shard` handles the backbone; each device has the whole router
        strategy = "ddp" if devices * nodes > 1 else "auto"
    settings = {**keywords, "devices": devices, "num_nodes": nodes, "strategy": strategy}
    if not {"val_check_interval", "check_val_every_n_epoch"} & {*keywords}:  # validate after whole optimizer steps
        accumulated = keywords.get("accumulate_grad_batches", 1)
        count = min(VALIDATIONS, max(1, keywords["max_steps"] // APART))
        settings["val_check_interval"] = max(1, keywords["max_steps"] // count) * accumulated
        settings["check_val_every_n_epoch"] = None
    elif isinstance(keywords.get("val_check_interval"), int):  # of steps, which may be more than an epoch has
        settings.setdefault("check_val_every_n_epoch", None)
    # With deterministic algorithms torch would fill the memory of each result first: 4 % of a training step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        return lightning.Trainer(**(TRAINER | settings | options))
    except Exception as error:  # Lightning refuses settings with many types of errors
        raise TrainingError(
            f"Lightning refuses the section trainer here ({reason(error)}); change it, which has trainer.accelerator="
            f"{keywords['accelerator']}, trainer.devices={devices} and trainer.strategy={keywords['strategy']}."
        ) from error


def instantiate(spec: ClassSpec, kind: type) -> Any:
    """An object of the recipe's `callbacks` or `logger`.

    Args:
        spec: its class and arguments.
        kind: Lightning's `Callback` or `Logger`.

    Raises:
        RecipeError: the class cannot be imported, does not take its arguments, or is of another kind.
    """
    from lightning.pytorch.cli import instantiate_class

    key = "callbacks" if kind is Callback else "logger"
    try:
        made = instantiate_class((), asdict(spec))
    except Exception as error:  # foreign code
        raise RecipeError(
            f"{spec.class_path} of {key} cannot be created ({described(error)}); correct class_path or init_args."
        ) from error
    if not isinstance(made, kind):
        raise RecipeError(f"{spec.class_path} of {key} is no {kind.__name__} of Lightning's; give one.")
    return made
