"""Curves of loss over budgets → a budget for each request, and what that costs on average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def by_epsilon(increase: np.ndarray, arms: np.ndarray, epsilon: float) -> np.ndarray:
    """(N,) places of the smallest arm whose increase is at most ε, of the largest where none is.

    Args:
        increase: (N, A) nats a token above full depth.
        arms: (A,) executed layers, deepest first.
    """
    near = np.where(increase <= epsilon, arms, arms.max() + 1)
    return np.where((increase <= epsilon).any(1), near.argmin(1), arms.argmax())


def by_price(increase: np.ndarray, arms: np.ndarray, price: float) -> np.ndarray:
    """(N,) places of the arm with the least increase + price · layers: best for the average at that price."""
    return (increase + price * arms).argmin(1)


def thresholds(increase: np.ndarray, count: int = 60) -> np.ndarray:
    """Values of ε that are worth trying: quantiles of what the increases are, and nought."""
    return np.unique(np.concatenate([[0.0], np.quantile(increase, np.linspace(0, 1, count)).clip(min=0)]))


def prices(increase: np.ndarray, arms: np.ndarray, count: int = 60) -> np.ndarray:
    """Prices, nats a layer, that are worth trying: quantiles of the slopes between any two arms."""
    slopes = [(increase[:, low] - increase[:, high]) / (arms[high] - arms[low]) for high, low in _pairs(len(arms))]
    return np.unique(np.quantile(np.concatenate(slopes), np.linspace(0, 1, count)).clip(min=0))


def spent(places: np.ndarray, losses: np.ndarray, arms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) layers and (N,) losses of requests that run the arms in these places.

    Args:
        losses: (N, A) nats a token.
    """
    return arms[places].astype(np.float64), losses[np.arange(len(losses)), places]


def folds(groups: Sequence[object], count: int) -> np.ndarray:
    """(N,) fold of each row: rows of one group share a fold, groups are dealt out in the order in which they come."""
    place = {group: number % count for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([place[group] for group in groups])


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    yield from ((high, low) for high in range(count) for low in range(high + 1, count))
