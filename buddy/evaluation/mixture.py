"""What a coin between two fixed budgets reaches: the rival of anything that varies the budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


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
