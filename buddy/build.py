"""Recipe or run folder → backbone, router, model, data. The one place where configuration meets classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning

from buddy import distributed
from buddy.backbone.adapter import Adapter
from buddy.backbone.load import Backbone, load_backbone
from buddy.backbone.sharding import STRATEGY, finish_sharding, is_sharded, shard
from buddy.data.module import TextData
from buddy.data.text import same_source
from buddy.data.windows import Windows, windows_of
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RecipeError, RunError, TrainingError
from buddy.io import cache_folder
from buddy.latency import LatencyTable
from buddy.losses import Objective
from buddy.predictor.features import Predictor
from buddy.predictor.fit import load_predictor
from buddy.registry import build
from buddy.router import AnyRouter, available_budgets
from buddy.run import Run, check_backbone
from buddy.run_files import ADAPTER, load_router
from buddy.schema import ClassSpec, Recipe
from buddy.training.estimators import Estimator, estimator_for
from buddy.training.healing import HealingModule, Joint
from buddy.training.module import RoutingModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATIONS = 4  # in a fit, unless the recipe says otherwise
HEALING_CHANGES = {"kind", "lr", "steps"}  # keys of `adapter` that may change when a healing is resumed


def build_backbone(recipe: Recipe, *, on_cpu: bool = False) -> Backbone:
    """The backbone that a recipe names, on this process's accelerator where there is one and else on the CPU.

    Args:
        on_cpu: leave it on the CPU, since its weights will be sharded.
    """
    section = recipe.backbone
    backbone = load_backbone(
        section.name, section.dtype, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    if not on_cpu:
        backbone.model.to(distributed.device(recipe.trainer["accelerator"]))
    return backbone


def build_model(recipe: Recipe, backbone: Backbone) -> RoutedLM:
    """The backbone with the recipe's router attached, not calibrated yet.

    Raises:
        BudgetError: a budget below what the always-on layers allow.
    """
    routing = recipe.routing
    geometry = geometry_of(backbone, routing.context_layer, routing.pool)  # type: ignore[arg-type]  # as below
    routed = RoutedLM(
        backbone,
        build(recipe.router.name, geometry, recipe.router.options),
        pool=routing.pool,  # type: ignore[arg-type]  # a recipe accepts these words alone
        sink_tokens=routing.sink_tokens,
        prompt_plan=routing.prompt_plan,  # type: ignore[arg-type]
        policy=routing.policy,
        reroute_every=routing.reroute_every,
        batch_plan=routing.batch_plan,  # type: ignore[arg-type]
    )
    routed.table = LatencyTable(cache_folder("latency"))
    for budget in available_budgets(routed.router, recipe.budgets):
        routed.executed_layers(budget)
    return routed


def attach_predictor(recipe: Recipe, routed: RoutedLM, predictor: Predictor) -> None:
    """Let `--budget auto` use a budget predictor, up to the recipe's cap."""
    cap = routed.executed_layers(recipe.predictor.cap)
    routed.chooser = lambda most: predictor.chooser(min(most, cap))


def heals(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether a router gets an adapter: where the recipe has one, every router that skips layers does."""
    return recipe.adapter is not None and not router.full_depth


def build_adapter(recipe: Recipe, backbone: Backbone, context_layer: int) -> Adapter:
    """A new adapter as the recipe's section says, on the backbone's layers after the context layers.

    Raises:
        TrainingError: target modules that the layers do not have.
    """
    section = recipe.adapter
    return Adapter.new(
        backbone,
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        targets=section.targets,
        first=context_layer,
        seed=recipe.seed,
    )


def build_data(recipe: Recipe, backbone: Backbone) -> TextData:
    """The recipe's text, which `prepare_data` and `setup` read later.

    Raises:
        RecipeError: windows longer than the backbone's context, or an additional text that is the recipe's own.
    """
    data = recipe.data
    for key in ("train_sources", "calibration_sources"):
        if any(same_source(each, data.source) for each in getattr(data, key)):
            raise RecipeError(
                f"data.{key} holds {data.source}, which is data.source: its test windows would be trained on. Leave it "
                "out; its own training share is used anyway."
            )
    if data.window > backbone.context_length:
        raise RecipeError(
            f"data.window is {data.window}, but {backbone.name} reads at most {backbone.context_length} tokens; set "
            "data.window to that or less."
        )
    return TextData(
        data.source,
        backbone.tokenizer,
        window=data.window,
        batch_size=data.batch_size,
        seed=recipe.data_seed,
        train_seed=recipe.seed,
        calibration_windows=data.calibration_windows,
        validation_windows=data.validation_windows,
        test_windows=data.test_windows,
        text_field=data.text_field,
        train_sources=data.train_sources,
        calibration_sources=data.calibration_sources,
    )


def build_held_out(recipe: Recipe, backbone: Backbone, *, calibration: bool = False) -> TextData:
    """The recipe's text, read and split, for use without training: additional training texts are not read.

    Args:
        calibration: whether calibration windows are needed, which may need `data.calibration_sources`.

    Raises:
        BuddyError: as `build_data`, or the text cannot be read.
    """
    data = replace(recipe.data, train_sources=[])
    data = data if calibration else replace(data, calibration_sources=[])
    text = build_data(replace(recipe, data=data), backbone)
    text.prepare_data()
    text.setup()
    return text


def build_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: str, *, count: int, window: int | None = None
) -> Windows:
    """Up to `count` windows of another text than the recipe's, cut with its seed, as long as its own by default.

    Raises:
        DataError: the text cannot be read, or is too short for one window.
    """
    data = recipe.data
    length, seed = window or data.window, recipe.data_seed
    return windows_of(source, tokenizer, window=length, count=count, seed=seed, text_field=data.text_field)


def load_model(run: Run, merged: bool = False) -> RoutedLM:
    """The model of a complete run, ready to serve.

    Args:
        merged: add a healed run's adapter to the weights, so that it costs no time; there is no stock model then.
            Otherwise the adapter stays beside the weights and can be switched off.

    Raises:
        RunError: the backbone has changed, or the saved router, adapter or budget predictor does not fit.
    """
    backbone = _backbone_from(run)
    routed = build_model(run.recipe, backbone)
    restore(routed, run.recipe, run.folder)
    if merged and routed.adapter is not None:
        routed.merge()
    predictor = load_predictor(run.folder, routed.geometry)
    if predictor is not None:
        attach_predictor(run.recipe, routed, predictor.to(backbone.device))
    return routed


def _backbone_from(run: Run) -> Backbone:
    """The run's backbone, sharded where its recipe says so and several processes are together."""
    trainer = run.recipe.trainer
    sharded = distributed.is_distributed() and is_sharded(trainer)
    with distributed.one_by_one(trainer) if sharded else nullcontext():
        backbone = build_backbone(run.recipe, on_cpu=sharded)
        check_backbone(run, backbone.fingerprint)
        if sharded:
            shard(backbone, trainer["accelerator"])
    if sharded:
        finish_sharding(backbone)
    return backbone


def restore(routed: RoutedLM, recipe: Recipe, folder: Path) -> None:
    """Load router and adapter of the complete run in a folder into a model, frozen.

    Raises:
        RunError: the saved router does not fit its class, or the adapter is damaged or for another backbone.
    """
    restore_router(routed, folder)
    if heals(recipe, routed.router):
        routed.adapt(Adapter.load(routed.backbone, folder / ADAPTER))


def restore_router(routed: RoutedLM, folder: Path) -> None:
    """Load the router of the complete run in a folder into a model, frozen.

    Raises:
        RunError: the saved router does not fit its class.
    """
    try:
        routed.router.load_state_dict(load_router(folder))
    except RuntimeError as error:
        raise RunError(
            f"The router saved in {folder} does not fit its class any more; make the run again with `buddy fit`."
        ) from error
    routed.router.eval().requires_grad_(False)


def build_estimator(recipe: Recipe, router: AnyRouter) -> Estimator:
    """The recipe's estimator with its objective; layerwise routers have one of their own.

    Raises:
        RegistryError: no estimator of that name.
    """
    section = recipe.objective
    return estimator_for(router, section.estimator, Objective(section.kl, section.ce), asdict(section))


def build_module(recipe: Recipe, routed: RoutedLM) -> RoutingModule:
    """The LightningModule that trains a recipe's router."""
    optimizer = recipe.optimizer
    return RoutingModule(
        routed,
        budgets=available_budgets(routed.router, recipe.budgets),
        estimator=build_estimator(recipe, routed.router),
        prompt=recipe.data.prompt,
        lr=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        seed=recipe.seed,
    )


def trains_both(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether healing trains the router too."""
    return recipe.adapter is not None and recipe.adapter.joint and router.trainable


def build_healing(recipe: Recipe, routed: RoutedLM, checkpoint: Path) -> HealingModule:
    """The LightningModule that trains a recipe's adapter, and the path of its checkpoint."""
    optimizer, both = recipe.optimizer, trains_both(recipe, routed.router)
    return HealingModule(
        routed,
        budgets=available_budgets(routed.router, recipe.budgets),
        objective=Objective(recipe.objective.kl, recipe.objective.ce),
        prompt=recipe.data.prompt,
        lr=recipe.adapter.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        seed=recipe.seed,
        identity=healing_identity(recipe, routed.router),
        checkpoint=str(checkpoint),
        joint=Joint(build_estimator(recipe, routed.router), optimizer.lr) if both else None,
    )


def healing_identity(recipe: Recipe, router: AnyRouter) -> dict[str, str]:
    """Settings and digest of the router that an interrupted healing must have been begun with to be resumed."""
    settings = {
        f"adapter.{key}": str(value) for key, value in asdict(recipe.adapter).items() if key not in HEALING_CHANGES
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(router.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return {**settings, "the router": digest.hexdigest()[:16]}


def build_trainer(recipe: Recipe, **options: Any) -> lightning.Trainer:
    """Lightning's trainer with the keywords of a recipe; those in `options` come on top.

    Raises:
        TrainingError: it refuses them.
    """
    keywords = recipe.trainer
    strategy = keywords["strategy"]
    if any(way in str(strategy) for way in ("spawn", "fork", "notebook")):
        raise TrainingError(
            f"trainer.strategy={strategy} cannot start processes for a routed model; choose ddp instead."
        )
    devices, nodes = distributed.device_counts(keywords)
    if strategy == STRATEGY:  # the backbone is sharded before; the router is whole on each device
        strategy = "ddp" if devices * nodes > 1 else "auto"
    settings = {**keywords, "devices": devices, "num_nodes": nodes, "strategy": strategy}
    try:
        return lightning.Trainer(**(trainer_defaults(keywords) | settings | options))
    except Exception as error:  # only settings are looked at here, and they are refused with many kinds of error
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        raise TrainingError(
            f"trainer.accelerator={keywords['accelerator']}, devices={devices} and strategy={keywords['strategy']} do "
            f"not work here ({reason}); change them."
        ) from error


def trainer_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Buddy's trainers do unless a recipe says otherwise: they validate four times, each time after a whole step.

    Inference mode stays off, since tensors made in it cannot be trained with later.
    """
    steps, accumulated = settings.get("max_steps", -1), settings.get("accumulate_grad_batches", 1)
    validation = {"val_check_interval": max(1, steps // VALIDATIONS) * accumulated, "check_val_every_n_epoch": None}
    own = {"val_check_interval", "check_val_every_n_epoch"} & {*settings}
    return ({} if own or steps < 1 else validation) | {
        "max_epochs": -1,
        "enable_model_summary": False,
        "deterministic": "warn",
        "inference_mode": False,
        "num_sanity_val_steps": 0,
    }


def instantiate(spec: ClassSpec) -> Any:
    """The object of a class of the recipe's `callbacks` or `logger`.

    Raises:
        RecipeError: the class cannot be imported, or does not take its arguments.
    """
    from lightning.pytorch.cli import instantiate_class

    try:
        return instantiate_class((), asdict(spec))
    except Exception as error:  # third-party code
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RecipeError(f"{spec.class_path} cannot be made ({type(error).__name__}: {reason}); change it.") from error
