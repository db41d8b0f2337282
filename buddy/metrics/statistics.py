"""Bootstrap intervals over documents and seeds, flips of answers, and mixtures of fixed budgets.

Documents and seeds are both samples. Every resample draws documents once for all routers, so that differences are
paired, and for each router separately as many of its seeds as it has. The random streams are fixed: the same numbers
give the same interval in every process and on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
SEEDS, REFERENCE_SEEDS = 1, 2  # random streams of the seeds; stream 0 draws the documents
Interval = tuple[float, float]


def resamples(documents: int) -> np.ndarray:
    """(RESAMPLES, documents) indices of drawn documents, the same for every router."""
    return np.random.default_rng(0).integers(documents, size=(RESAMPLES, documents))


def quantiles(values: np.ndarray) -> Interval:
    """The bounds of the middle 95 % of the values (percentile method)."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_loss(loss: np.ndarray, tokens: np.ndarray) -> float:
    """Mean cross-entropy over tokens and seeds, in nats per token.

    Args:
        loss: (seeds, documents) summed cross-entropy in nats.
        tokens: (documents,) scored tokens.
    """
    return float(np.mean([seed.sum() for seed in loss]) / tokens.sum())


def loss_interval(loss: np.ndarray, tokens: np.ndarray) -> Interval:
    """Bootstrap interval of `mean_loss` over documents and seeds."""
    return quantiles(_resampled(loss, tokens, SEEDS))


def difference(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray) -> tuple[float, Interval]:
    """Difference of mean cross-entropy (ours − theirs, nats per token) and its paired bootstrap interval.

    Args:
        ours: (seeds, documents) summed cross-entropy in nats.
        theirs: the reference on the same documents; the number of seeds may differ.
        tokens: (documents,) scored tokens.
    """
    estimates = _resampled(ours, tokens, SEEDS) - _resampled(theirs, tokens, REFERENCE_SEEDS)
    return mean_loss(ours, tokens) - mean_loss(theirs, tokens), quantiles(estimates)


def accuracy_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, Interval]:
    """Difference of the mean accuracy over tasks (ours − theirs) and its paired interval over items and seeds.

    Every resample draws the items of each task once for both, and then seeds for each separately.

    Args:
        ours: for each task (seeds, items) of 0 and 1.
        theirs: the reference on the same items.

    Raises:
        ValueError: the numbers of items differ.
    """
    for one, other in zip(ours, theirs, strict=True):
        _check_items(one, other)
    estimates = _accuracies(ours, SEEDS) - _accuracies(theirs, REFERENCE_SEEDS)
    mean, reference = (float(np.mean([task.mean(1) for task in tasks])) for tasks in (ours, theirs))
    return mean - reference, quantiles(estimates)


def flips(full: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """1 for each answer that turns from right to wrong or from wrong to right, else 0 (2407.09141).

    Args:
        full: (..., items) 0 or 1, at full depth.
        pruned: the same items with layers skipped.

    Raises:
        ValueError: the numbers of items differ.
    """
    full, pruned = np.asarray(full), np.asarray(pruned)
    _check_items(full, pruned)
    return (full != pruned).astype(int)


def _check_items(one: np.ndarray, other: np.ndarray) -> None:
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(f"{one.shape[-1]} and {other.shape[-1]} items cannot be compared")


def mixed(points: Mapping[float, float], layers: float) -> float | None:
    """The least mean loss of a random mixture of two fixed budgets that runs so many layers on average.

    None where there are fewer than two budgets or `layers` is outside them.

    Args:
        points: layers → mean loss of each fixed budget.
    """
    if len(points) < 2 or not min(points) <= layers <= max(points):
        return None
    pairs = ([low, high] for low in points for high in points if low <= layers <= high)
    return min(float(np.interp(layers, pair, [points[each] for each in pair])) for pair in pairs)


def _resampled(loss: np.ndarray, tokens: np.ndarray, stream: int) -> np.ndarray:
    """(RESAMPLES,) mean cross-entropy of each resample."""
    drawn = resamples(len(tokens))
    return _over_seeds(loss[:, drawn].sum(2) / tokens[drawn].sum(1), stream)


def _accuracies(tasks: Sequence[np.ndarray], stream: int) -> np.ndarray:
    """(RESAMPLES,) mean accuracy over tasks of each resample."""
    means = (task @ _item_weights(task.shape[1], place).T for place, task in enumerate(tasks))
    return _over_seeds(sum(means) / len(tasks), stream)


@lru_cache(maxsize=32)
def _item_weights(items: int, task: int) -> np.ndarray:
    """(RESAMPLES, items): the share that each item has in each resample of a task."""
    return np.random.default_rng((1, task)).multinomial(items, np.full(items, 1 / items), RESAMPLES) / items


def _over_seeds(values: np.ndarray, stream: int) -> np.ndarray:
    """(RESAMPLES,) means over the seeds drawn for each resample, of values (seeds, RESAMPLES)."""
    seeds = np.random.default_rng((0, stream)).integers(len(values), size=(RESAMPLES, len(values)))
    return values[seeds, np.arange(RESAMPLES)[:, None]].mean(1)
