"""Recipe or run folder → backbone, router and model, without importing Lightning: serving a run then starts sooner."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from buddy import distributed
from buddy.backbone.adapter import Adapter
from buddy.backbone.load import Backbone, fastest_dtype, is_local, load_backbone
from buddy.backbone.sharding import finish_sharding, is_sharded, shard
from buddy.console import stderr
from buddy.engine.bridges import Bridges
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BackboneError, RecipeError, RunError, reason
from buddy.io import cache_folder, keep_freed_memory
from buddy.latency import LatencyTable
from buddy.predictor.train import load_predictor
from buddy.provenance import code_digest
from buddy.registry import build, load
from buddy.router import AnyRouter, available_budgets
from buddy.run import Run, check_backbone, code_changed
from buddy.run_files import ADAPTER, BRIDGE, load_router
from buddy.schema import Recipe


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
