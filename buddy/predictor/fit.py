"""Fit, save and load a recipe's budget predictor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from buddy.config import Recipe
from buddy.console import errors, tracker
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DamagedError, RunError
from buddy.io import load_tensors, read_json, save_tensors, write_json
from buddy.predictor.features import Targets, digest_of, measure, ordered, size_of
from buddy.predictor.grpo import BudgetPolicy, Progress, Weights, random_entropy, train_policy
from buddy.predictor.regress import CurvePredictor
from buddy.router import Geometry, available_budgets
from buddy.run import PREDICTOR, PREDICTOR_FACTS

AnyPredictor = CurvePredictor | BudgetPolicy


def save_predictor(folder: Path, predictor: AnyPredictor, options: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        folder: of the run.
        predictor: fitted.
        options: keyword arguments that it was made with.
        facts: what else people may want to know.
    """
    said = {"name": predictor.name, "layers": list(predictor.arms), "options": dict(options), **facts}
    save_tensors(folder / PREDICTOR, predictor.state_dict(), {"format": "pt"})
    write_json(folder / PREDICTOR_FACTS, said)


def load_predictor(folder: Path, geometry: Geometry) -> AnyPredictor | None:
    """The predictor of a run, None where it has none.

    Raises:
        RunError: a file is missing or DamagedError, or it was made for another model.
    """
    if not (folder / PREDICTOR_FACTS).exists() and not (folder / PREDICTOR).exists():
        return None
    facts = read_json(folder / PREDICTOR_FACTS)
    try:
        made = make_predictor(facts["name"], geometry, facts["layers"], facts["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(folder / PREDICTOR_FACTS, f"it does not describe a predictor: {error}") from error
    try:
        made.load_state_dict(load_tensors(folder / PREDICTOR))
    except RuntimeError as error:
        raise RunError(
            f"The budget predictor saved in {folder} does not fit this model; make the run again with `buddy fit`."
        ) from error
    return made.eval().requires_grad_(False)


def make_predictor(name: str, geometry: Geometry, arms: list[int], options: Mapping[str, Any]) -> AnyPredictor:
    """A predictor that is not fitted yet; ValueError for an unknown name."""
    kinds: dict[str, type[nn.Module]] = {kind.name: kind for kind in (CurvePredictor, BudgetPolicy)}
    if name not in kinds:
        raise ValueError(f"no predictor is named {name!r}")
    return kinds[name](size_of(geometry), arms, **options)


KEPT = "predictor-targets-{}.safetensors"  # in the folder of an unfinished run


def fit_predictor(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path) -> AnyPredictor | None:
    """Measure training windows at every budget, fit the recipe's predictor and save it; nothing where it names none.

    Windows are those of the training steps that would follow the last one: drawn from the training split as router and
    adapter were given theirs, and others than those, though they may overlap. In a distributed run the first process
    does this, while the others wait to evaluate.

    Args:
        recipe: the whole run.
        routed: model and router, as they will serve.
        data: the text, set up.
        folder: of the run that is being made. What was measured stays there until `forget_targets`, so that the same
            call goes on from it.
    """
    section = recipe.predictor
    for name in (PREDICTOR, PREDICTOR_FACTS):  # of an earlier beginning, perhaps by another recipe
        (folder / name).unlink(missing_ok=True)
    if section.name is None:
        return None
    arms = arms_of(recipe, routed)
    targets = _targets(recipe, routed, data, folder, arms)
    options: dict[str, Any] = {"hidden": section.hidden}
    if section.name == CurvePredictor.name:
        options = {"pooled": routed.geometry.features, "epsilon": section.epsilon}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        predictor = make_predictor(section.name, routed.geometry, list(arms), options)
    fitted = _regressed if isinstance(predictor, CurvePredictor) else partial(_taught, recipe, routed.geometry.layers)
    facts = fitted(predictor, targets, folder)
    save_predictor(folder, predictor.requires_grad_(False), options, {"windows": len(targets.losses), **facts})
    return predictor.to(routed.backbone.device)


def forget_targets(folder: Path) -> None:
    """Remove what was measured; the run is whole."""
    for path in folder.glob(KEPT.format("*")):
        path.unlink()


def arms_of(recipe: Recipe, routed: RoutedLM) -> tuple[int, ...]:
    """Executed layers K that the predictor may choose: the recipe's budgets that do not pass its cap, deepest first.

    Raises:
        BudgetError: there is nothing to choose between.
    """
    most = routed.executed_layers(recipe.predictor.cap) if not routed.router.full_depth else routed.geometry.layers
    counts = [routed.executed_layers(budget) for budget in available_budgets(routed.router, recipe.budgets)]
    arms = ordered([count for count in counts if count <= most])
    if len(arms) < 2:
        raise BudgetError(
            f"A budget predictor chooses between budgets, and here are {len(arms)} for it ({recipe.router.name}, at "
            f"most {most} layers); list more budgets, raise predictor.cap, or set predictor.name=null."
        )
    return arms


def _targets(recipe: Recipe, routed: RoutedLM, data: TextData, folder: Path, arms: tuple[int, ...]) -> Targets:
    data.train_seed = recipe.seed
    first, count = _last_step(recipe), -(-recipe.predictor.windows // data.batch_size)
    batches = [partial(data.batch, first + number) for number in range(count)]
    prompt = recipe.data.prompt
    texts = data.fingerprint, data.train_fingerprint, recipe.seed
    place = folder / KEPT.format(digest_of(routed, texts, first, count, data.batch_size, arms, prompt))
    words = f"Losses of {count * data.batch_size} windows at {len(arms)} budgets"
    return measure(routed, batches, arms, prompt=prompt, place=place, track=tracker(words))


def _last_step(recipe: Recipe) -> int:
    """After it neither the router nor an adapter was given the windows."""
    return max(recipe.trainer["max_steps"], recipe.adapter.steps if recipe.adapter else 0)


def _regressed(predictor: CurvePredictor, targets: Targets, folder: Path) -> dict[str, Any]:
    """Fit; how well the increases are predicted for requests that were left out."""
    increase = targets.increase(predictor.arms)
    left_out = predictor.fit(targets.features, increase)
    error, spread = (left_out - increase).square().mean(0).sqrt(), increase.std(0, correction=0)
    rows = zip(predictor.arms, increase.mean(0).tolist(), spread.tolist(), error.tolist(), strict=True)
    curve = [{"layers": k, "increase": mean, "spread": wide, "error": off} for k, mean, wide, off in rows]
    named = {tag: [(row["layers"], row[tag]) for row in curve[::-1]] for tag in ("increase", "error", "spread")}
    _write(folder, {f"predictor/{tag}": points for tag, points in named.items()})
    said = [f"{r['error']:.3f} at {r['layers']} ({r['spread']:.3f})" for r in curve if r["spread"] > 0]
    errors.print(
        f"Error of the predicted rise of the loss by layers (and what always saying the mean would err), nats a token: "
        f"{', '.join(said)}.",
        soft_wrap=True,
    )
    return {"curve": curve}


def _taught(recipe: Recipe, layers: int, predictor: BudgetPolicy, targets: Targets, folder: Path) -> dict[str, Any]:
    """Train; where the policy began and ended."""
    section = recipe.predictor
    seen = train_policy(
        predictor,
        targets.features,
        targets.at(predictor.arms),
        layers,
        Weights(section.quality, section.cost, section.entropy, section.kl),
        steps=section.steps,
        lr=section.lr,
        samples=section.samples,
        seed=recipe.seed,
        track=tracker("Training the budget predictor"),
    )
    most = random_entropy(predictor.arms)
    _write(folder, _curves(seen, most))
    last = seen[-1]
    errors.print(f"Policy's entropy {last.entropy:.3f} of {most:.3f} (at random), {last.layers:.1f} layers on average.")
    return {"entropy": last.entropy, "entropy_at_random": most, "expected_layers": last.layers}


def _curves(seen: list[Progress], most: float) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's points: the entropy beside that of a policy at random, reward and layers, over steps."""
    named = {name: [(each.step, getattr(each, name)) for each in seen] for name in ("entropy", "reward", "layers")}
    named["entropy_at_random"] = [(each.step, most) for each in seen]
    return {f"predictor/{name}": points for name, points in named.items()}


def _write(folder: Path, curves: dict[str, list[tuple[int, float]]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(tag, value, step)
