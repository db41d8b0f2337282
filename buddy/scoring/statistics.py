"""Paired bootstrap over documents and seeds, flips of answers, and mixtures of fixed budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from buddy.scoring.perplexity import RESAMPLES, Scores, quantiles, resamples

SEEDS, REFERENCE_SEEDS = 1, 2  # streams of random numbers, apart from that of the documents


def mean_loss(scores: Sequence[Scores]) -> float:
    """Mean cross-entropy over all tokens and seeds, nats a token."""
    return float(np.mean([each.loss.sum() for each in scores]) / scores[0].tokens.sum())


def loss_interval(scores: Sequence[Scores], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of `mean_loss` over documents and seeds."""
    return quantiles(_resampled(scores, SEEDS), level)


def difference(
    ours: Sequence[Scores], theirs: Sequence[Scores], level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Difference of mean cross-entropy (ours − theirs, nats a token) and its interval, over documents and seeds.

    Args:
        ours: one entry a seed, all on the same documents.
        theirs: likewise; the number of seeds may be another.
    """
    estimates = _resampled(ours, SEEDS) - _resampled(theirs, REFERENCE_SEEDS)
    return mean_loss(ours) - mean_loss(theirs), quantiles(estimates, level)


def accuracy_difference(
    ours: Sequence[Sequence[Sequence[int]]], theirs: Sequence[Sequence[Sequence[int]]], level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Difference of the mean accuracy over tasks (ours − theirs), and its interval over items and seeds.

    Every resample draws items of each task once for both, and then seeds for each by itself.

    Args:
        ours: for each seed and task whether each item was answered right, 0 or 1.
        theirs: likewise, on the same items.
    """
    estimates = _accuracies(ours, SEEDS) - _accuracies(theirs, REFERENCE_SEEDS)
    return float(_accuracy(ours) - _accuracy(theirs)), quantiles(estimates, level)


def _accuracy(answers: Sequence[Sequence[Sequence[int]]]) -> float:
    return float(np.mean([[np.mean(task) for task in seed] for seed in answers]))


def _accuracies(answers: Sequence[Sequence[Sequence[int]]], stream: int) -> np.ndarray:
    """(RESAMPLES,) mean accuracy over tasks of each resample."""
    sums = sum(
        np.array(task) @ _item_weights(len(task[0]), place).T for place, task in enumerate(zip(*answers, strict=True))
    )
    return _over_seeds(sums / len(answers[0]), stream)


@lru_cache(maxsize=32)
def _item_weights(items: int, task: int) -> np.ndarray:
    """(RESAMPLES, items): the share that each item has in each resample of a task."""
    return np.random.default_rng((1, task)).multinomial(items, np.full(items, 1 / items), RESAMPLES) / items


def _over_seeds(values: np.ndarray, stream: int) -> np.ndarray:
    """(RESAMPLES,) means over seeds drawn anew in each resample, of values (seeds, RESAMPLES)."""
    seeds = np.random.default_rng((0, stream)).integers(len(values), size=(RESAMPLES, len(values)))
    return values[seeds, np.arange(RESAMPLES)[:, None]].mean(1)


def _resampled(scores: Sequence[Scores], stream: int) -> np.ndarray:
    """(RESAMPLES,) mean cross-entropy of each resample."""
    tokens, losses = scores[0].tokens, np.stack([each.loss for each in scores])
    drawn = resamples(len(tokens))
    return _over_seeds(losses[:, drawn].sum(2) / tokens[drawn].sum(1), stream)


def flipped(full: Sequence[int], pruned: Sequence[int]) -> list[int]:
    """1 for each item that one of both answers rightly and the other wrongly, else 0.

    Args:
        full: 0 or 1 for each item, at full depth.
        pruned: the same items with layers left out.

    Raises:
        ValueError: not as many items.
    """
    return [int(one != other) for one, other in zip(full, pruned, strict=True)]


def hull(points: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Layers and losses, rising in layers, of those fixed budgets that no coin between two others beats.

    Args:
        points: layers → mean loss of each fixed budget.
    """
    kept: list[tuple[float, float]] = []
    for layers, loss in sorted(points.items()):
        while len(kept) > 1 and _above(kept[-2], kept[-1], (layers, loss)):
            kept.pop()
        kept.append((layers, loss))
    return tuple(np.array(column, dtype=np.float64) for column in zip(*kept, strict=True))  # type: ignore[return-value]


def mixed(points: Mapping[float, float], layers: float) -> float | None:
    """The least mean loss of a coin between two fixed budgets that runs so many layers on average.

    None where there are fewer than two budgets or `layers` lies outside of them.
    """
    if len(points) < 2 or not min(points) <= layers <= max(points):
        return None
    return float(np.interp(layers, *hull(points)))


def layers_at(points: Mapping[float, float], loss: float) -> float | None:
    """The layers that the best coin between two fixed budgets runs on average to reach a mean loss.

    None where no coin reaches it, or the smallest budget is better already.
    """
    layers, losses = hull(points)
    falling = np.minimum.accumulate(losses)
    if not falling[-1] <= loss <= falling[0]:
        return None
    return float(np.interp(-loss, -falling, layers))


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    (x, y), (u, v), (w, z) = first, middle, last
    return (v - y) * (w - x) >= (z - y) * (u - x)
