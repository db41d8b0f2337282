"""Recipe or run folder → backbone, router, model, data. The one place where configuration meets classes."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from buddy import distributed
from buddy.backbone.adapter import Adapter, check_targets
from buddy.backbone.load import Backbone, fastest_dtype, is_local, load_backbone
from buddy.backbone.sharding import STRATEGY, finish_sharding, is_sharded, shard
from buddy.console import stderr
from buddy.data.documents import read_documents
from buddy.data.module import TextData
from buddy.data.text import overlap
from buddy.data.windows import Windows, sample
from buddy.engine.bridges import Bridges
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BackboneError, DataError, RecipeError, RunError, TrainingError, described, reason
from buddy.io import cache_folder, keep_freed_memory
from buddy.latency import LatencyTable
from buddy.losses import Objective
from buddy.metrics.perplexity import Reference
from buddy.predictor.train import load_predictor, predictor_arms
from buddy.provenance import ESTIMATOR_KEYS, TRAINING_KEYS, code_digest
from buddy.registry import build, load
from buddy.router import AnyRouter, LayerwiseRouter, available_budgets
from buddy.run import Run, check_backbone, code_changed
from buddy.run_files import ADAPTER, BRIDGE, load_router, read_metrics
from buddy.schema import ClassSpec, Recipe
from buddy.training.estimators import Estimator, Perturbed, StraightThrough, estimator_for
from buddy.training.healing import HealingModule
from buddy.training.module import RoutingModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATIONS, APART = 4, 25  # in a training by default: at most so many, at least so many steps apart
TRAINER: dict[str, Any] = {  # defaults of Buddy's trainers
    "max_epochs": -1,
    "enable_model_summary": False,
    "deterministic": "warn",
    "inference_mode": False,  # training cannot use its tensors
    "num_sanity_val_steps": 0,
}


def with_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the type that `backbone.dtype: auto` means here, as its runs store it."""
    if recipe.backbone.dtype != "auto":
        return recipe
    dtype = fastest_dtype(recipe.trainer["accelerator"])
    return replace(recipe, backbone=replace(recipe.backbone, dtype=dtype))


def build_backbone(recipe: Recipe, *, on_cpu: bool = False) -> Backbone:
    """The backbone of a recipe, on this process's device.

    Args:
        on_cpu: leave it on the CPU, to shard its weights next.
    """
    keep_freed_memory()
    backbone = load_backbone(**asdict(with_dtype(recipe).backbone))
    if not on_cpu:
        backbone.model.to(distributed.device(recipe.trainer["accelerator"]))
    return backbone


def build_router(recipe: Recipe, backbone: Backbone) -> AnyRouter:
    """The recipe's router for a backbone, before calibration."""
    routing, section = recipe.routing, recipe.router
    geometry = geometry_of(backbone, routing.context_layer, routing.pool)  # type: ignore[arg-type]  # a recipe checks it
    return build(section.name, geometry, section.options)


def build_model(recipe: Recipe, backbone: Backbone) -> RoutedLM:
    """The backbone with the recipe's router attached, before calibration.

    Raises:
        BudgetError: a budget below the always-on layers.
    """
    routing = asdict(recipe.routing)
    del routing["context_layer"]  # the router's geometry has it
    routed = RoutedLM(backbone, build_router(recipe, backbone), **routing)
    routed.table = LatencyTable(cache_folder("latency"))
    counts_of(recipe, routed)
    return routed


def counts_of(recipe: Recipe, routed: RoutedLM) -> dict[float, int]:
    """K for each of the recipe's budgets that the router can have; BudgetError for one below the always-on layers."""
    return {each: routed.executed_layers(each) for each in available_budgets(routed.router, recipe.budgets)}


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


def check_mean(model: RoutedLM) -> None:
    """Raises RecipeError where budgets cannot be means, because tokens or rows share plans."""
    over = model.settings.mean_over
    if over > 1 and model.settings.competing == 1 and model.router.scope == "token":
        raise RecipeError(
            f"routing.mean_over={over} needs a plan for each token of each row; set "
            "routing.prompt_plan=token, routing.batch_plan=row and routing.reroute_every=1, or routing.mean_over=1 "
            "(--mean-over 1)."
        )


def uses_bridges(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether a router gets bridges: the recipe has them, and the router skips layers."""
    return recipe.bridge is not None and not router.full_depth


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


def ignored_keys(recipe: Recipe, router: AnyRouter) -> tuple[str, ...]:
    """Beginnings of a recipe's keys that change nothing in a run of a router, given before its training."""
    estimated = router.trainable and not isinstance(router, LayerwiseRouter)  # its gates have their own estimator
    # A predictor measures losses on windows of the training text.
    trained = router.trainable or healing_steps(recipe, router) > 0 or recipe.predictor.name is not None
    return (*(() if estimated else ESTIMATOR_KEYS), *(() if trained else TRAINING_KEYS))


def build_data(recipe: Recipe, backbone: Backbone) -> TextData:
    """The recipe's text, before `prepare_data` and `setup`.

    Raises:
        RecipeError: windows longer than the backbone's context, or an additional text that is the recipe's own.
    """
    data = recipe.data
    for key in ("train_sources", "calibration_sources"):
        if any(overlap(each, data.source) for each in getattr(data, key)):
            raise RecipeError(
                f"data.{key} holds text of data.source, {data.source}: its test windows would be trained on. Leave it "
                "out; its own training share is used anyway."
            )
    if data.window > backbone.context_length:
        raise RecipeError(
            f"data.window is {data.window}, but {backbone.name} reads at most {backbone.context_length} tokens; set "
            "data.window to that or less."
        )
    options = asdict(data) | {"seed": recipe.data_seed, "train_seed": recipe.seed}
    del options["prompt"]  # a matter of evaluation
    return TextData(tokenizer=backbone.tokenizer, **options)


def check_unseen(recipe: Recipe, source: str) -> None:
    """Raises DataError where a text holds one that runs of the recipe are fitted to."""
    for key in ("source", "train_sources", "calibration_sources"):
        sources = getattr(recipe.data, key)
        for seen in [sources] if key == "source" else sources:
            if overlap(source, seen):
                raise DataError(f"{source} shares text with {seen}, which data.{key} fits to; name another text.")


def build_held_out(recipe: Recipe, backbone: Backbone, *, calibration: bool = False) -> TextData:
    """The recipe's text, read and split, without the additional training texts.

    Args:
        calibration: read the additional calibration texts.

    Raises:
        BuddyError: see `build_data`, or the text cannot be read.
    """
    data = replace(recipe.data, train_sources=[])
    data = data if calibration else replace(data, calibration_sources=[])
    text = build_data(replace(recipe, data=data), backbone)
    text.setup()
    return text


def held_out(run: Run, backbone: Backbone, *, calibration: bool = False) -> TextData:
    """`build_held_out` for a complete run, whose text must be the one that it was fitted to.

    Raises:
        RunError: the text has changed, so that its held-out windows may have been trained on.
    """
    text = build_held_out(run.recipe, backbone, calibration=calibration)
    if read_metrics(run.folder).get("windows", text.evaluated.fingerprint) != text.evaluated.fingerprint:
        raise RunError(
            f"The text {run.recipe.data.source} has changed since the run was fitted, so its split is another one; "
            "restore it, or name a text that the run was not fitted to with --data."
        )
    return text


def build_windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    count: int,
    window: int | None = None,
    seen: Collection[str] = (),
) -> Windows:
    """Up to `count` windows of another text, with the recipe's seed and by default its length.

    Args:
        seen: digests of texts that runs are fitted to (`TextData.text_digests`), for windows of the recipe's length.

    Raises:
        DataError: the text cannot be read, is too short for one window, or is one of those that were seen.
    """
    data = recipe.data
    length = window or data.window
    documents = read_documents(source, tokenizer, length, data.text_field)
    if seen and documents.digest in seen:
        raise DataError(f"{source} has the same content as a text that routers are fitted to; name another text.")
    return sample(documents, length, count, recipe.data_seed)


def build_unseen(run: Run, tokenizer: PreTrainedTokenizerBase, source: str, *, count: int) -> Windows:
    """`build_windows` of a text that a complete run was not fitted to, wherever its texts lie now.

    Raises:
        DataError: the text cannot be read, is too short for one window, or the run was fitted to it.
    """
    check_unseen(run.recipe, source)
    seen = read_metrics(run.folder).get("texts", ())  # a run of an earlier version has none
    return build_windows(run.recipe, tokenizer, source, count=count, seen=seen)


def load_model(run: Run, merged: bool = False) -> RoutedLM:
    """The model of a complete run, ready to serve.

    Args:
        merged: add a healed run's adapter to the weights, so that it costs no time, but cannot be disabled.

    Raises:
        RunError: the backbone has changed, or the saved router, adapter or budget predictor does not match.
    """
    if code_changed(run.folder, code_digest(load(run.recipe.router.name))):
        stderr.print(f"Warning: {run.folder} was made by other code of its router; it may plan otherwise than it did.")
    backbone = _backbone_from(run)
    routed = build_model(run.recipe, backbone)
    restore(routed, run.recipe, run.folder)
    if merged and routed.adapter is not None:
        routed.merge()
    predictor = load_predictor(run.folder, routed.geometry)
    if predictor is not None:
        cap = routed.executed_layers(run.recipe.predictor.cap)
        predictor.to(backbone.device)
        routed.chooser = lambda most: predictor.chooser(min(most, cap))
    return routed


def _backbone_from(run: Run) -> Backbone:
    """The run's backbone, sharded if its recipe says so and several processes are connected."""
    trainer = run.recipe.trainer
    sharded = distributed.is_distributed() and is_sharded(trainer)
    with distributed.one_by_one(trainer) if sharded else nullcontext():
        try:
            backbone = build_backbone(run.recipe, on_cpu=sharded)
        except BackboneError as error:
            name = run.recipe.backbone.name
            if not is_local(name) or os.path.isdir(os.path.expanduser(name)):
                raise
            raise BackboneError(
                f"{run.folder} was fitted on the model {name!r}, which cannot be loaded from here ({reason(error)}); "
                "work in the folder where it was fitted, or name the model's own: buddy.load(…, backbone=FOLDER)."
            ) from error
        check_backbone(run, backbone.fingerprint, backbone.details)
        if sharded:
            shard(backbone, trainer["accelerator"])
    if sharded:
        finish_sharding(backbone)
    return backbone


def restore(routed: RoutedLM, recipe: Recipe, folder: Path, *, adapter: bool = True) -> None:
    """Load router, bridges and adapter of the complete run in a folder into a model, frozen.

    Args:
        routed: the model.
        recipe: of the run.
        folder: of the run.
        adapter: load the adapter too, if the recipe has one.

    Raises:
        RunError: the saved router does not fit its class, the bridges are damaged, or the adapter is damaged or for
            another backbone.
    """
    try:
        routed.router.load_state_dict(load_router(folder))
    except RuntimeError as error:
        raise RunError(
            f"The router saved in {folder} does not fit its class ({reason(error)}); make the run again with "
            "`buddy fit`."
        ) from error
    routed.router.eval().requires_grad_(False)
    if uses_bridges(recipe, routed.router):
        routed.bridge(Bridges.load(folder / BRIDGE, routed.geometry, recipe.bridge.rank))
    if adapter and recipe.adapter is not None and not routed.router.full_depth:
        routed.adapter = Adapter.load(routed.backbone, folder / ADAPTER)


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


def trains_both(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether healing trains the router too."""
    return recipe.adapter is not None and recipe.adapter.joint and router.trainable


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
