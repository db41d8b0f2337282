"""Recipe or run folder → the objects they name. The one place where configuration meets classes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from buddy import distributed
from buddy.backbone.adapter import Adapter
from buddy.backbone.load import Backbone, load_backbone
from buddy.backbone.sharding import settle, shard, shards
from buddy.config import Recipe
from buddy.data.module import TextData
from buddy.data.text import same_source
from buddy.data.windows import Windows, windows_of
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RecipeError, RunError
from buddy.io import cache_folder
from buddy.latency import LatencyTable
from buddy.predictor.features import Predictor
from buddy.predictor.fit import load_predictor
from buddy.registry import build
from buddy.router import AnyRouter, available_budgets
from buddy.run import ADAPTER, Run, check_backbone, load_router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_backbone(recipe: Recipe, *, stays: bool = False) -> Backbone:
    """The backbone that a recipe names, on this process's accelerator where there is one and else on the CPU.

    Args:
        stays: on the CPU, since its weights will be shared out.
    """
    section = recipe.backbone
    backbone = load_backbone(
        section.name, section.dtype, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    if not stays:
        backbone.model.to(distributed.device(recipe.trainer.accelerator))
    return backbone


def build_model(recipe: Recipe, backbone: Backbone) -> RoutedLM:
    """The backbone with the recipe's router attached, not calibrated yet.

    Raises:
        BudgetError: a budget below what the always-on layers allow.
    """
    routing = recipe.routing
    geometry = geometry_of(backbone, routing.context_layer, routing.pool)  # type: ignore[arg-type]  # as below
    routed = attach_router(recipe, backbone, build(recipe.router.name, geometry, recipe.router.options))
    for budget in available_budgets(routed.router, recipe.budgets):
        routed.executed_layers(budget)
    return routed


def attach_router(recipe: Recipe, backbone: Backbone, router: AnyRouter) -> RoutedLM:
    """The backbone with a router attached in the way that the recipe's routing says."""
    routing = recipe.routing
    routed = RoutedLM(
        backbone,
        router,
        pool=routing.pool,  # type: ignore[arg-type]  # the schema accepts these words alone
        sink_tokens=routing.sink_tokens,
        prompt_plan=routing.prompt_plan,  # type: ignore[arg-type]
        policy=routing.policy,
        reroute_every=routing.reroute_every,
        batch_plan=routing.batch_plan,  # type: ignore[arg-type]
    )
    routed.table = LatencyTable(cache_folder("latency"))
    return routed


def attach_predictor(recipe: Recipe, routed: RoutedLM, predictor: Predictor) -> None:
    """Attach a budget predictor, which never passes the recipe's cap; `--budget auto` asks it from now on."""
    cap = routed.executed_layers(recipe.predictor.cap)
    routed.chooser = lambda most: predictor.chooser(min(most, cap))


def heals(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether an adapter belongs to a router: where the recipe has one, to all that skip layers at all."""
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
    """The recipe's text, described and not yet read.

    Raises:
        RecipeError: windows longer than the backbone can read, or more texts that are the recipe's own once more.
    """
    data = recipe.data
    for key in ("train_sources", "calibration_sources"):
        if any(same_source(each, data.source) for each in getattr(data, key)):
            raise RecipeError(
                f"data.{key} holds {data.source}, which is data.source: its test windows would be learned from. Leave "
                "it out; its own share for learning is used anyway."
            )
    if data.window > backbone.context_length:
        raise RecipeError(
            f"data.window is {data.window}, but {backbone.name} reads at most {backbone.context_length} tokens; set "
            "data.window to that or less."
        )
    return TextData(
        backbone.tokenizer,
        data.source,
        window=data.window,
        batch_size=data.batch_size,
        steps=recipe.trainer.max_steps,
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
    """The recipe's text, read and split, for those who train nothing: no other text to train on is needed for it.

    Args:
        calibration: whether calibration windows are wanted, for which `data.calibration_sources` have to be read.

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
    """Up to `count` windows of a text that is not the recipe's, cut with its seed, as long as its own by default.

    Raises:
        DataError: the text cannot be read, or is too short for one window.
    """
    data = recipe.data
    length, seed = window or data.window, recipe.data_seed
    return windows_of(source, tokenizer, window=length, count=count, seed=seed, text_field=data.text_field)


def load_model(run: Run, merged: bool = False) -> RoutedLM:
    """The model of a finished run, ready to serve.

    Args:
        merged: add a healed run's adapter to the weights, so that it costs nothing; nothing stands for the stock model
            then. Without it the adapter stays beside the weights and can be switched off.

    Raises:
        RunError: the backbone is another one now, or the saved router, adapter or budget predictor does not fit.
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
    """The run's backbone; its weights shared out where the recipe says so and the processes are together."""
    trainer = run.recipe.trainer
    shared_out = distributed.together() and shards(trainer)
    with distributed.one_by_one(trainer) if shared_out else nullcontext():
        backbone = build_backbone(run.recipe, stays=shared_out)
        check_backbone(run, backbone.fingerprint)
        if shared_out:
            shard(backbone, trainer.accelerator)
    if shared_out:
        settle(backbone)
    return backbone


def restore(routed: RoutedLM, recipe: Recipe, folder: Path) -> None:
    """Bring a model to the state of the finished run in a folder: its router's, and its adapter.

    Raises:
        RunError: the saved router does not fit its class, or the adapter is damaged or for another backbone.
    """
    restore_router(routed, folder)
    if heals(recipe, routed.router):
        routed.adapt(Adapter.load(routed.backbone, folder / ADAPTER))


def restore_router(routed: RoutedLM, folder: Path) -> None:
    """Bring a model's router to the state of the finished run in a folder, frozen.

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
