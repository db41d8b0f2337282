"""Greedy removal of layers: a building block of several routers, no router itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buddy import Probe


class GreedyRemoval:
    """Removes one routable layer after the other, each time the one without which the loss is least.

    In each round every layer that is left is removed in turn, together with those removed before. Ties go to the
    earlier layer. Plans nest, so one search answers every K.

    Args:
        probe: measures the losses.
        criterion: "ce", next-token cross-entropy, or "kl", KL to the dense model.
        windows: how many calibration windows from the first one, or the numbers of some windows; None for all.
        bridged: measure with bridges in place, where the recipe has them, fitted again in each round.
    """

    def __init__(
        self,
        probe: Probe,
        criterion: str = "ce",
        windows: int | Sequence[int] | None = None,
        bridged: bool = False,
    ) -> None:
        self.probe, self.criterion, self.windows, self.bridged = probe, criterion, windows, bridged
        self.removed: list[int] = []
        self.left = list(range(probe.geometry.routable))
        self.losses = [0.0] * len(self.left)  # without each layer that is left, in the last round

    @property
    def rounds(self) -> int:
        """How many layers must go for the smallest K of the recipe's budgets, or all where there is no budget."""
        geometry = self.probe.geometry
        return geometry.layers - min(self.probe.asked, default=geometry.always_on)

    def measure(self, windows: int | Sequence[int] | None) -> list[float]:
        """Mean loss without each layer that is left; what was measured before is not measured again."""
        if self.bridged:
            self.probe.bridge(self.removed)
        plans = torch.stack([self.probe.plan_without([*self.removed, layer]) for layer in self.left])
        return self.probe.losses(plans, self.criterion, windows).mean(1).tolist()  # type: ignore[arg-type]

    def remove_one(self) -> None:
        """One round."""
        self.losses = self.measure(self.windows)
        least = self.losses.index(min(self.losses))
        self.losses.pop(least)
        self.removed.append(self.left.pop(least))

    def rank(self) -> Tensor:
        """(R,) float32: the order in which layers go; layers that are left follow by their loss in the last round."""
        order = self.removed + [layer for _, layer in sorted(zip(self.losses, self.left, strict=True))]
        return torch.tensor(order).argsort().float()
