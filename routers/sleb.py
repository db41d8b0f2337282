"""SLEB: remove one layer after the other, each time the one that hurts least (Song et al., 2402.09025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from buddy import Context, Geometry, Router

if TYPE_CHECKING:
    from buddy import Probe


PARTS = 8  # a round measures its windows in so many goes, so that the progress bar moves


class SLEB(Router):
    """Removes greedily the layer whose loss now raises the calibration cross-entropy least, again and again.

    Algorithm 1 with metric 3 (section 3.3): in each round every layer still there is left out in turn, together with
    those removed before, and the one with the least negative log-likelihood of the calibration text goes. Ties go to
    the earlier layer, as in the authors' code. Plans nest, so one search down to the smallest K asked for serves all
    budgets; the layers that are left then are ranked by their losses of the last round.

    Deviations from the paper: the sinks run every layer while a loss is measured; the calibration text is the recipe's
    instead of 128 samples of WikiText-2. The first and the last layer always run, in the paper's code too.

    Args:
        geometry: sizes of the backbone.
        windows: calibration windows that the losses are measured on, the first ones; null for all.

    Raises:
        ValueError: no window.
    """

    source = "arXiv 2402.09025"

    def __init__(self, geometry: Geometry, *, windows: int | None = None) -> None:
        super().__init__(geometry)
        if windows is not None and windows < 1:
            raise ValueError(f"windows is {windows}; give 1 or more, or null for all")
        self.windows = windows
        self.register_buffer("rank", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Search on the calibration windows, down to the smallest K asked for, or to the end where none is."""
        total = probe.count if self.windows is None else min(self.windows, probe.count)
        parts = sorted({-(-total * part // PARTS) for part in range(1, PARTS + 1)})
        rounds = self.geometry.layers - min(probe.asked, default=self.geometry.always_on)
        removed: list[int] = []
        left, losses = list(range(self.geometry.routable)), []
        for windows in probe.track(parts * rounds, "removing layers"):
            plans = torch.stack([probe.plan_without([*removed, layer]) for layer in left])
            losses = probe.losses(plans, windows=windows).mean(1).tolist()
            if windows == total:
                least = losses.index(min(losses))
                removed.append(left.pop(least))
                losses.pop(least)
        order = removed + [layer for _, layer in sorted(zip(losses, left, strict=True))]
        self.rank[order] = torch.arange(len(order), dtype=self.rank.dtype, device=self.rank.device)

    def score(self, context: Context) -> Tensor:
        """(..., R): the round in which the layer went; the same for every token."""
        return self.rank.expand(*context.executed.shape, -1)
