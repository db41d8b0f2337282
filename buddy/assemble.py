"""Recipe or run folder → the objects they name. The one place where configuration meets classes."""

from __future__ import annotations

import torch

from buddy.backbone import Backbone, load_backbone
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RecipeError, RunError
from buddy.registry import build
from buddy.router import AnyRouter
from buddy.runs import Run, check_backbone, load_router
from buddy.schema import Recipe
from buddy.training.data import TextData


def backbone_of(recipe: Recipe) -> Backbone:
    """The backbone that a recipe names, on the recipe's accelerator where there is one and else on the CPU."""
    section = recipe.backbone
    backbone = load_backbone(
        section.name, section.dtype, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    if recipe.trainer.accelerator != "cpu" and torch.accelerator.is_available():
        backbone.model.to(torch.accelerator.current_accelerator())
    return backbone


def routed_of(recipe: Recipe, backbone: Backbone) -> RoutedLM:
    """The backbone with the recipe's router attached, not calibrated yet.

    Raises:
        BudgetError: a budget below what the always-on layers allow.
    """
    routing = recipe.routing
    geometry = geometry_of(backbone, routing.context_layer, routing.pool)
    routed = attached(recipe, backbone, build(recipe.router.name, geometry, recipe.router.options))
    for budget in budgets_of(recipe, routed):
        routed.executed_layers(budget)
    return routed


def attached(recipe: Recipe, backbone: Backbone, router: AnyRouter) -> RoutedLM:
    """The backbone with a router attached in the way that the recipe's routing says."""
    routing = recipe.routing
    return RoutedLM(
        backbone,
        router,
        pool=routing.pool,
        sink_tokens=routing.sink_tokens,
        prompt_plan=routing.prompt_plan,
        policy=routing.policy,
        reroute_every=routing.reroute_every,
        batch_plan=routing.batch_plan,
    )


def budgets_of(recipe: Recipe, routed: RoutedLM) -> list[float]:
    """The recipe's budgets that this router can be asked for: full depth alone where it runs every layer."""
    return [1.0] if routed.router.full_depth else list(recipe.budgets)


def data_of(recipe: Recipe, backbone: Backbone) -> TextData:
    """The recipe's text, described and not yet read.

    Raises:
        RecipeError: windows longer than the backbone can read.
    """
    data = recipe.data
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
    )


def routed_from(run: Run) -> RoutedLM:
    """The model of a finished run, ready to serve.

    Raises:
        RunError: the backbone is another one now, or the saved router does not fit its class.
    """
    backbone = backbone_of(run.recipe)
    check_backbone(run, backbone.fingerprint)
    routed = routed_of(run.recipe, backbone)
    try:
        routed.router.load_state_dict(load_router(run.folder))
    except RuntimeError as error:
        raise RunError(
            f"The router saved in {run.folder} does not fit its class any more; make the run again with `buddy fit`."
        ) from error
    routed.router.eval().requires_grad_(False)
    return routed
