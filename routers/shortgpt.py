"""ShortGPT: keep the layers that change the hidden state most (Men et al., 2403.03853)."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router


class ShortGPT(Router):
    """Static: a layer's score is its Block Influence, 1 − E[cos(h_in, h_out)], measured once.

    Deviation from the paper: the context layers and the last always run, as for every router here, and the attention
    sinks, which no plan touches, are left out of the mean.
    """

    source = "arXiv 2403.03853"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.register_buffer("influence", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Measure Block Influence on the calibration windows (section 3, eq. 1)."""
        self.influence.copy_(probe.block_influence)

    def score(self, context: Context) -> Tensor:
        """(..., R): Block Influence, the same for every token."""
        return self.influence.expand(*context.executed.shape, -1)
