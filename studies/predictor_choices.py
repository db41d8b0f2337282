"""Methods of choosing a budget for each of many measured requests, and what each of them saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from buddy.console import Track
from buddy.metrics.statistics import mixed
from buddy.predictor.grpo import BudgetPolicy, train_policy
from buddy.predictor.regress import CurvePredictor
from buddy.schema import PredictorSection

FOLDS = 4
RESAMPLES = 1000
POLICIES = 5  # costs of a policy that are tried
POLICY: dict[str, Any] = {"steps": 2000, "lr": 1e-3}
Chosen = dict[str, list[np.ndarray]]  # method → indices of arms (N,), one array for each setting that is tried
Sample = list[tuple[float, float]]  # mean layers and loss of each setting


def by_epsilon(increase: np.ndarray, arms: np.ndarray, epsilon: float) -> np.ndarray:
    """(N,) indices of the smallest arm whose increase is at most ε, of the largest arm where there is none.

    Args:
        increase: (N, A) nats per token above full depth.
        arms: (A,) executed layers, deepest first.
    """
    near = np.where(increase <= epsilon, arms, arms.max() + 1)
    return np.where((increase <= epsilon).any(1), near.argmin(1), arms.argmax())


def by_price(increase: np.ndarray, arms: np.ndarray, price: float) -> np.ndarray:
    """(N,) indices of the arm with the least increase + price · layers: the best average at that price."""
    return (increase + price * arms).argmin(1)


def thresholds(increase: np.ndarray, count: int = 60) -> np.ndarray:
    """Values of ε to try: quantiles of the increases, and 0."""
    return np.unique(np.concatenate([[0.0], np.quantile(increase, np.linspace(0, 1, count)).clip(min=0)]))


def prices(increase: np.ndarray, arms: np.ndarray, count: int = 60) -> np.ndarray:
    """Prices to try, nats per layer: quantiles of the slopes between any two arms."""
    slopes = [(increase[:, low] - increase[:, high]) / (arms[high] - arms[low]) for high, low in _pairs(len(arms))]
    return np.unique(np.quantile(np.concatenate(slopes), np.linspace(0, 1, count)).clip(min=0))


def spent(places: np.ndarray, losses: np.ndarray, arms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) layers and (N,) losses of requests that run the arms at these indices.

    Args:
        losses: (N, A) nats per token.
    """
    return arms[places].astype(np.float64), losses[np.arange(len(losses)), places]


def folds(groups: Sequence[object], count: int) -> np.ndarray:
    """(N,) fold of each row: rows of one group share a fold, and groups take folds in turn."""
    place = {group: number % count for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([place[group] for group in groups])


def hull(points: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Layers, rising, and losses of the fixed budgets that no random mixture of two others beats."""
    coins = {each: mixed({k: loss for k, loss in points.items() if k != each}, each) for each in sorted(points)}
    kept = [each for each, coin in coins.items() if coin is None or points[each] < coin]
    return np.array(kept), np.array([points[each] for each in kept])


def layers_at(points: Mapping[float, float], loss: float) -> float | None:
    """The mean layers of the cheapest mixture of two fixed budgets that reaches a mean loss.

    None where no mixture reaches it, or where the smallest budget is better already.
    """
    layers, losses = hull(points)
    falling = np.minimum.accumulate(losses)
    if not falling[-1] <= loss <= falling[0]:
        return None
    return float(np.interp(-loss, -falling, layers))


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    yield from ((high, low) for high in range(count) for low in range(high + 1, count))


@dataclass(frozen=True)
class Measured:
    """Windows of several texts, measured at every arm.

    Attributes:
        arms: (A,) executed layers, deepest first; the first is full depth.
        losses: (N, A) nats per token.
        features: (N, size).
        pooled: how many features at the start are the pooled states.
        domains: label of each window's text.
        documents: (N,) text and document of each window, which is what is resampled.
    """

    arms: np.ndarray
    losses: np.ndarray
    features: torch.Tensor
    pooled: int
    domains: list[str]
    documents: list[tuple[str, int]]

    @property
    def increase(self) -> np.ndarray:
        """(N, A) nats per token above full depth."""
        return self.losses - self.losses[:, :1]


def choices(measured: Measured, track: Track = iter) -> Chosen:
    """Indices of the arms that each method chooses, for each of its settings.

    "regress" takes the smallest budget within ε; "priced" the least sum of predicted increase and price · layers, from
    the same predictions; "grpo" the likeliest budget of a policy; "hindsight" is "priced" from the true losses.
    """
    fold = folds(measured.documents, FOLDS)
    predicted = _left_out(measured, fold)
    arms, true = measured.arms, measured.increase
    return {
        "regress": [by_epsilon(predicted, arms, epsilon) for epsilon in thresholds(predicted)],
        "priced": [by_price(predicted, arms, price) for price in prices(predicted, arms)],
        "grpo": [_policies(measured, fold, cost) for cost in track(costs(measured))],
        "hindsight": [by_price(true, arms, price) for price in prices(true, arms)],
    }


def costs(measured: Measured, quality: float = 5.0) -> list[float]:
    """Costs of a policy to try: the average value of depth, at the slopes from budget to budget."""
    slopes = np.diff(measured.losses.mean(0)) / -np.diff(measured.arms)
    return (quality * int(measured.arms[0]) * np.quantile(slopes, np.linspace(0.1, 0.9, POLICIES))).tolist()


def compared(measured: Measured, chosen: Chosen) -> dict[str, Any]:
    """Saving of each method against the best mixture of fixed budgets, on the same resampled documents.

    Returns:
        "fixed": for the loss of each fixed budget, the layers that each method needs and the saving with its 95 %
        interval; "single": the same for methods of one setting, at their own loss; "points": mean layers and loss of
        every setting.
    """
    fixed = [np.full(len(measured.losses), place) for place in range(len(measured.arms))]
    outcomes = {
        name: [spent(places, measured.losses, measured.arms) for places in each]
        for name, each in {"fixed": fixed, **chosen}.items()
    }
    weights = _resampled(measured.documents)
    points = {name: _points(each, weights) for name, each in outcomes.items()}
    rows = [
        {"layers": layers, "loss": loss, "ways": {name: _saving(points, name, place) for name in _swept(chosen)}}
        for place, (layers, loss) in enumerate(points["fixed"][0])
    ]
    single = {name: _alone(points, name) for name in chosen if name not in _swept(chosen)}
    named = {name: [{"layers": x, "loss": y} for x, y in each[0]] for name, each in points.items()}
    spread = dict(zip(map(str, measured.arms.tolist()), measured.increase.std(0).tolist(), strict=True))
    return {"fixed": rows, "single": single, "points": named, "spread": spread, "windows": len(measured.losses)}


def _swept(chosen: Chosen) -> list[str]:
    return [name for name, each in chosen.items() if len(each) > 1]


def _saving(points: dict[str, list[Sample]], name: str, place: int) -> dict[str, Any] | None:
    """Layers at the loss of a fixed budget, in each resample its own loss, and their saving.

    None where this method's losses do not include that loss.
    """
    pairs = []
    for ours, fixed in zip(points[name], points["fixed"], strict=True):
        loss = fixed[place][1]
        pairs.append((along(ours, loss), layers_at(dict(fixed), loss)))
    return _summed(pairs)


def _alone(points: dict[str, list[Sample]], name: str) -> dict[str, Any] | None:
    """The same for a method of one setting, at its own loss."""
    pairs = [
        (ours[0][0], layers_at(dict(fixed), ours[0][1]))
        for ours, fixed in zip(points[name], points["fixed"], strict=True)
    ]
    found = _summed(pairs)
    return None if found is None else found | {"loss": points[name][0][0][1]}


def _summed(pairs: list[tuple[float | None, float | None]]) -> dict[str, Any] | None:
    """Of (layers, layers of the mixture): the first pair's values, and quantiles of the saving over the others."""
    ours, fixed = pairs[0]
    if ours is None or fixed is None:
        return None
    saved = [theirs - mine for mine, theirs in pairs[1:] if mine is not None and theirs is not None]
    low, high = np.quantile(saved, [0.025, 0.975]).tolist()
    return {"layers": ours, "saved": fixed - ours, "interval": [low, high]}


def along(points: Sample, loss: float) -> float | None:
    """The layers from which on no setting loses more than `loss`, linear between settings; None where there are none.

    A single lucky setting does not count, which is a stricter rule than the mixture's.
    """
    layers, losses = (np.array(column) for column in zip(*sorted(points), strict=True))
    worst = np.maximum.accumulate(losses[::-1])[::-1]
    if not worst[-1] <= loss <= worst[0]:
        return None
    return float(np.interp(-loss, -worst, layers))


def _points(outcomes: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> list[Sample]:
    """Mean (layers, loss) of each setting, for the windows as they are and for each resample."""
    layers, losses = (np.stack(column, 1) for column in zip(*outcomes, strict=True))
    means = zip((weights @ layers).tolist(), (weights @ losses).tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in means]


def _resampled(documents: Sequence[tuple[str, int]]) -> np.ndarray:
    """(1 + RESAMPLES, N): weights of the windows, equal in the first row, then of documents resampled by text."""
    random, names = np.random.default_rng(0), list(dict.fromkeys(documents))
    place = np.array([names.index(document) for document in documents])
    counts = [np.ones(len(names))]
    for _ in range(RESAMPLES):
        drawn = np.zeros(len(names))
        for domain in dict.fromkeys(domain for domain, _ in names):
            own = [number for number, (name, _) in enumerate(names) if name == domain]
            np.add.at(drawn, random.choice(own, len(own)), 1)
        counts.append(drawn)
    weights = np.stack(counts)[:, place]
    return weights / weights.sum(1, keepdims=True)


def _left_out(measured: Measured, fold: np.ndarray) -> np.ndarray:
    """(N, A): increases as predicted by regressions on the other folds."""
    predicted = np.zeros_like(measured.losses)
    for number in range(FOLDS):
        rest, own = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        size, arms = measured.features.shape[1], measured.arms.tolist()
        predictor = CurvePredictor(size, arms, pooled=measured.pooled, epsilon=0.0)
        predictor.fit(measured.features[rest], torch.from_numpy(measured.increase[rest]))
        predicted[own] = predictor.increase(measured.features[own]).double().numpy()
    return predicted


def _policies(measured: Measured, fold: np.ndarray, cost: float) -> np.ndarray:
    """(N,) indices chosen by policies that were trained on the other folds."""
    places = np.zeros(len(measured.losses), dtype=np.int64)
    layers, losses = int(measured.arms[0]), torch.from_numpy(measured.losses)
    for number in range(FOLDS):
        rest, own = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            policy = BudgetPolicy(measured.features.shape[1], measured.arms.tolist())
        section = PredictorSection(cost=cost, **POLICY)
        train_policy(policy, measured.features[rest], losses[rest], layers, section, seed=number, points=1)
        with torch.no_grad():
            places[own] = policy(measured.features[own]).argmax(-1).numpy()
    return places
