"""What both predictors see of a prompt, and what they may choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.errors import BudgetError
from buddy.router import Context, Geometry

Choose = Callable[[Context], Tensor]


class Predictor(Protocol):
    """The interface of both; they share no code but this module's."""

    name: str
    arms: tuple[int, ...]

    def under(self, most: int) -> Choose:
        """What chooses one of the arms (...) long for contexts (...), none of them above `most` layers."""


def size_of(geometry: Geometry) -> int:
    """Length of the feature vector."""
    return 2 * geometry.features + geometry.hidden


def features_of(context: Context) -> Tensor:
    """(..., 2F + D) float32: pooled states, newest states, the newest hidden state; each with mean 0 and variance 1."""
    parts = (context.pooled, context.newest, context.hidden)
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], -1)


def ordered(arms: Sequence[int]) -> tuple[int, ...]:
    """Executed layers K to choose from, each once, deepest first."""
    return tuple(sorted(set(arms), reverse=True))


def allowed(arms: Sequence[int], most: int) -> list[int]:
    """Places of the arms that do not pass a cap.

    Raises:
        BudgetError: none.
    """
    places = [place for place, arm in enumerate(arms) if arm <= most]
    if not places:
        raise BudgetError(
            f"The cap leaves {most} layers, but this run's predictor chooses from {min(arms)} on; raise the cap to "
            f"{min(arms)}layers or more, or ask for {most}layers without auto."
        )
    return places
