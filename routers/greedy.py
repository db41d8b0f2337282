"""Greedy removal of layers: a building block of several routers, no router itself."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from buddy import Probe


class GreedyRemoval:
    """Removes one routable layer after the other, each time the one without which the cross-entropy is least.

    In each round every layer that is left is removed in turn, together with those removed before. Ties go to the
    earlier layer. Plans nest, so one search answers every K.

    Args:
        probe: measures the losses.
        windows: how many calibration windows from the first one, or the numbers of some windows.
    """

    def __init__(self, probe: Probe, windows: int | Sequence[int]) -> None:
        self.probe, self.windows = probe, windows
        self.removed: list[int] = []
        self.left = list(range(probe.geometry.routable))
        self.losses = [0.0] * len(self.left)  # without each layer that is left, in the last round

    @property
    def rounds(self) -> int:
        """How many layers must go for the smallest K of the recipe's budgets, or all where there is no budget."""
        geometry = self.probe.geometry
        return geometry.layers - min(self.probe.layer_counts, default=geometry.always_on)

    def measure(self, windows: int | Sequence[int]) -> list[float]:
        """Mean loss without each layer that is left; what was measured before is not measured again."""
        plans = torch.stack([self.probe.plan_without([*self.removed, layer]) for layer in self.left])
        return self.probe.losses(plans, "ce", windows).mean(1).tolist()

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


class BridgedRemoval(GreedyRemoval):
    """Greedy removal by KL with bridges, fitted for each set that is measured, where the recipe has them.

    It measures on windows that no bridge is fitted on, as long as there are two or more.

    Few layers are measured in a round (lazy evaluation; Minoux, 1978). Removing a layer usually raises the KL no less
    than in an earlier round, so layers are measured in ascending order of their last rise, until the least rise of
    this round is below all that are left. The neighbours of the layer that went last are always measured: two adjacent
    layers may cost far less than one of them alone.
    """

    def __init__(self, probe: Probe, windows: int) -> None:
        super().__init__(probe, max(1, min(windows, probe.count - probe.bridge_windows)))
        self._kl = 0.0  # of what is removed
        self.losses = [-inf] * len(self.left)  # here the rise of the KL, as last measured; -inf: measure in any case

    def remove_one(self) -> None:
        """One round."""
        if self.removed:
            for number in _neighbours(self.left, self.removed[-1]):
                self.losses[number] = -inf
        rest, least = set(range(len(self.left))), inf
        while rest and (expected := min(self.losses[number] for number in rest)) < least:
            asked = sorted(number for number in rest if self.losses[number] == expected)
            plans = [self.probe.plan_without([*self.removed, self.left[number]]) for number in asked]
            kl = self.probe.losses(torch.stack(plans), "kl", self.windows, bridged=True).mean(1)
            for number, value in zip(asked, kl.tolist(), strict=True):
                self.losses[number] = value - self._kl
                least = min(least, self.losses[number])
            rest -= {*asked}
        gone = next(number for number, rise in enumerate(self.losses) if rise == least and number not in rest)
        self._kl += self.losses.pop(gone)
        self.removed.append(self.left.pop(gone))


def _neighbours(left: Sequence[int], removed: int) -> list[int]:
    """The numbers in `left` of the layers next to a removed one, on both sides."""
    after = sum(layer < removed for layer in left)
    return [number for number in (after - 1, after) if 0 <= number < len(left)]
