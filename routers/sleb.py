"""SLEB: remove one layer after the other, each time the one that hurts least (Song et al., 2402.09025)."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least
from routers.greedy import GreedyRemoval

PARTS = 8  # a round measures its windows in so many steps, so that the progress bar moves


class SLEB(Router):
    """Static: the later greedy removal drops a layer, the higher its score.

    Algorithm 1 with metric 3 (section 3.3): in each round every layer that is left is removed in turn, together with
    those removed before, and the one goes without which the negative log-likelihood of the calibration text is least.
    Ties go to the earlier layer, as in the authors' code. Plans nest, so one search down to the smallest K of the
    recipe serves all budgets; layers that are left then are ranked by their losses of the last round.

    Deviations from the paper: the sinks run every layer while a loss is measured; the calibration text is the recipe's
    instead of 128 samples of WikiText-2. The context layers and the last always run; in the
    paper's code the first and the last do.

    Args:
        geometry: sizes of the backbone.
        windows: how many calibration windows the losses are measured on, from the first one; null for all.

    Raises:
        ValueError: no window.
    """

    source = "arXiv 2402.09025"

    def __init__(self, geometry: Geometry, *, windows: int | None = None) -> None:
        super().__init__(geometry)
        check_least(1, windows=windows)
        self.windows = windows
        self.register_buffer("rank", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Search on the calibration windows, down to the smallest K of the recipe's budgets."""
        total = probe.count if self.windows is None else min(self.windows, probe.count)
        parts = sorted({-(-total * part // PARTS) for part in range(1, PARTS + 1)})
        search = GreedyRemoval(probe, total)
        for windows in probe.track(parts * search.rounds, "removing layers"):
            if windows < total:
                search.measure(windows)
            else:
                search.remove_one()
        self.rank.copy_(search.rank())

    def score(self, context: Context) -> Tensor:
        """(..., R): the round in which the layer was removed; the same for every token."""
        return self.rank.expand(*context.executed.shape, -1)
