"""The one plan that a run's tokens ask for most often at a budget, and how well it stands for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.inspection.domains import Domain
from buddy.inspection.measures import commonest_plan, measure
from buddy.inspection.observe import observe
from buddy.router import Context, Geometry, Router

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Choice:
    """A plan, and what tokens asked for. Sink tokens, which run every layer whatever the budget, are left out.

    Attributes:
        kept: indices of its layers, rising.
        layers: L, the depth of the backbone.
        tokens: routed tokens that were looked at.
        plans: distinct plans among them.
        share: tokens that asked for this very plan, from 0 to 1.
        overlap: of the layers that tokens chose (those that need not run), the share that this plan has.
    """

    kept: tuple[int, ...]
    layers: int
    tokens: int
    plans: int
    share: float
    overlap: float

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the layers that it lacks, rising."""
        return tuple(layer for layer in range(self.layers) if layer not in self.kept)


def most_frequent(
    routed: RoutedLM, windows: Windows, executed: int, *, prompt: int, batch_size: int = 4, track: Track = iter
) -> Choice:
    """The plan that most routed tokens of a text run.

    Args:
        routed: model and router.
        windows: of the text.
        executed: K.
        prompt: tokens at the start of each window that share a plan where prompts do.
        batch_size: windows a forward.
        track: wraps the list of forwards to show progress.
    """
    domain = Domain("text", None, windows, prompt)
    ((_, routing),) = observe(routed, [domain], [executed], batch_size=batch_size, track=track).items()
    plan = commonest_plan([routing])
    seen = measure(routing, plan, routed.geometry.always_on)
    kept = tuple(plan.nonzero()[0].tolist())
    return Choice(kept, len(plan), seen.tokens, seen.plans, seen.commonest, 1 - seen.off_commonest)


class OnePlan(Router):
    """Runs the same layers for every token.

    Args:
        geometry: sizes of the backbone.
        kept: indices of the layers that run, always-on ones included.
    """

    def __init__(self, geometry: Geometry, kept: Sequence[int]) -> None:
        super().__init__(geometry)
        runs = torch.zeros(geometry.layers)
        runs[list(kept)] = 1.0
        first = geometry.context_layer
        self.register_buffer("order", runs[first : first + geometry.routable])

    def score(self, context: Context) -> Tensor:
        """(..., R): 1 for a layer of the plan, 0 for another."""
        return self.order.expand(*context.executed.shape, -1)
