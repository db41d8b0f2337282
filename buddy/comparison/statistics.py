"""What may be said of routers that were fitted with several seeds and measured on the same documents.

Documents and seeds are both samples. Every resample draws documents once for all routers (so that differences are
paired) and, for each router by itself, as many of its seeds as it has.
"""

from __future__ import annotations

from collections.abc import Sequence
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
