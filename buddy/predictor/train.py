"""Fit, save and load a recipe's budget predictor, which serves `--budget auto`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from buddy.console import stderr, tracker
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DamagedError
from buddy.io import load_tensors, read_json, save_tensors, tensorboard_writer, write_json
from buddy.predictor.features import Predictor, Targets, feature_size, measure_targets, sorted_arms
from buddy.predictor.grpo import BudgetPolicy, train_policy
from buddy.predictor.regress import CurvePredictor
from buddy.router import Geometry, available_budgets
from buddy.run_files import PREDICTOR, PREDICTOR_FACTS, TARGETS
from buddy.schema import Recipe

if TYPE_CHECKING:
    from buddy.data.module import TextData

KINDS: dict[str, type[CurvePredictor] | type[BudgetPolicy]] = {
    kind.name: kind for kind in (CurvePredictor, BudgetPolicy)
}
Curves = dict[str, list[tuple[int, float]]]  # points (x, y) by TensorBoard tag


def fit_predictor(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path) -> None:
    """Measure training windows at every budget, fit the recipe's predictor, if it has one, and save it.

    The windows are those of the steps after the last training step: other draws from the training split, which may
    overlap with the ones of router and adapter. In a distributed run only the first process does this.

    Args:
        recipe: the whole run.
        routed: the model with its trained router.
        data: the text, set up.
        folder: the incomplete run. It holds the measurements until it is complete, so that the same call resumes after
            an interruption.
    """
    section = recipe.predictor
    for name in (PREDICTOR, PREDICTOR_FACTS):  # of an earlier attempt
        (folder / name).unlink(missing_ok=True)
    if section.name is None:
        return
    arms = predictor_arms(recipe, routed)
    targets = _measure(recipe, routed, data, folder, arms)
    options: dict[str, Any] = {"hidden": section.hidden}
    if section.name == CurvePredictor.name:
        options = {"pooled": routed.geometry.features, "epsilon": section.epsilon}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        predictor = KINDS[section.name](feature_size(routed.geometry), arms, **options)
    if isinstance(predictor, CurvePredictor):
        facts, curves = _regress(predictor, targets)
    else:
        facts, curves = _train(recipe, predictor, targets, routed.geometry.layers)
    with tensorboard_writer(folder, ".predictor") as writer:  # in place of the curves of a session that was killed
        for tag, points in curves.items():
            for x, y in points:
                writer.add_scalar(tag, y, x)
    described = {"name": predictor.name, "layers": list(arms), "options": options, "windows": len(targets.losses)}
    save_tensors(folder / PREDICTOR, predictor.requires_grad_(False).state_dict())
    write_json(folder / PREDICTOR_FACTS, described | facts)


def load_predictor(folder: Path, geometry: Geometry) -> Predictor | None:
    """The predictor of a run, frozen; None without one.

    Raises:
        RunError: a file is missing or damaged, or belongs to another model.
    """
    if not (folder / PREDICTOR_FACTS).exists() and not (folder / PREDICTOR).exists():
        return None
    facts = read_json(folder / PREDICTOR_FACTS)
    try:
        predictor = KINDS[facts["name"]](feature_size(geometry), facts["layers"], **facts["options"])
        predictor.load_state_dict(load_tensors(folder / PREDICTOR))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(folder / PREDICTOR_FACTS, f"it describes no predictor of this model: {error}") from error
    return predictor.eval().requires_grad_(False)


def predictor_arms(recipe: Recipe, routed: RoutedLM) -> tuple[int, ...]:
    """Executed layers K that the predictor may choose: the recipe's budgets up to its cap, deepest first.

    Raises:
        BudgetError: fewer than two.
    """
    most = routed.geometry.layers if routed.router.full_depth else routed.executed_layers(recipe.predictor.cap)
    counts = [routed.executed_layers(budget) for budget in available_budgets(routed.router, recipe.budgets)]
    arms = sorted_arms(count for count in counts if count <= most)
    if len(arms) < 2:
        raise BudgetError(
            f"A budget predictor chooses between budgets, and the router {recipe.router.name} has {len(arms)} of at "
            f"most {most} layers; list more budgets, raise predictor.cap, or set predictor.name=null."
        )
    return arms


def _measure(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, arms: tuple[int, ...]) -> Targets:
    data.train_seed = recipe.seed
    # Neither router nor adapter nor bridges were trained on the windows of these steps.
    adapter, bridge, most = recipe.adapter, recipe.bridge, recipe.trainer["max_steps"]
    bridged = bridge.steps + most * bridge.joint if bridge else 0
    first = recipe.trainer.get("accumulate_grad_batches", 1) * max(most, adapter.steps if adapter else 0, bridged)
    count = -(-recipe.predictor.windows // data.batch_size)
    batches = [partial(data.batch, first + number) for number in range(count)]
    return measure_targets(
        routed,
        batches,
        arms,
        prompt=recipe.data.prompt,
        store=folder / TARGETS,
        key=(data.fingerprint, data.tokens_digest, recipe.seed, first, data.batch_size),
        track=tracker(f"Losses of {count * data.batch_size} windows at {len(arms)} budgets"),
    )


def _regress(predictor: CurvePredictor, targets: Targets) -> tuple[dict[str, Any], Curves]:
    """Fit; returns the leave-one-out errors, as facts and as curves over layers."""
    increase = targets.increase(predictor.arms)
    left_out = predictor.fit(targets.features, increase)
    error, count = (left_out - increase).square().mean(0).sqrt(), len(increase)
    spread = increase.std(0, correction=0) * count / max(1, count - 1)  # leave-one-out error of the mean
    rows = zip(predictor.arms, increase.mean(0).tolist(), spread.tolist(), error.tolist(), strict=True)
    curve = [{"layers": k, "increase": mean, "spread": wide, "error": off} for k, mean, wide, off in rows]
    shown = [f"{r['error']:.3f} at {r['layers']} ({r['spread']:.3f})" for r in curve if r["spread"] > 0]
    stderr.print(
        f"Error of the predicted increase of the loss by layers (error of the mean in brackets), nats per token: "
        f"{', '.join(shown)}."
    )
    tags = ("increase", "error", "spread")
    return {"curve": curve}, {f"predictor/{tag}": [(row["layers"], row[tag]) for row in curve[::-1]] for tag in tags}


def _train(recipe: Recipe, policy: BudgetPolicy, targets: Targets, layers: int) -> tuple[dict[str, Any], Curves]:
    """Train; returns the final state of the policy as facts, and curves over steps."""
    losses, track = targets.at(policy.arms), tracker("Training the budget predictor")
    progress = train_policy(policy, targets.features, losses, layers, recipe.predictor, seed=recipe.seed, track=track)
    most, (entropy, count) = math.log(len(policy.arms)), (progress[name][-1][1] for name in ("entropy", "layers"))
    stderr.print(f"Entropy of the policy {entropy:.3f} of at most {most:.3f}, {count:.1f} layers on average.")
    curves = {f"predictor/{name}": points for name, points in progress.items()}
    curves["predictor/entropy_at_random"] = [(step, most) for step, _ in progress["entropy"]]
    return {"entropy": entropy, "entropy_at_random": most, "expected_layers": count}, curves
