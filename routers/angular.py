"""Angular distance: drop the block of layers that rotates the last token's state least (Gromov et al., 2403.17887)."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router


class Angular(Router):
    """Static: drops the contiguous block of n layers with the least angular distance, another block for each budget.

    Section 3.2: for each n the block starts at ℓ*(n) = argmin_ℓ d(x_ℓ, x_{ℓ+n}), where d(x, y) = arccos(x·y / |x||y|)
    / π between the inputs of layer ℓ and of layer ℓ + n, at the last token, averaged over the calibration windows
    (eq. 6 and 7). Ties go to the earlier block. One measurement serves every K.

    Deviation from the paper: the context layers and the last always run, as for every router here, so a block is
    between them. The paper heals with QLoRA afterwards; here nothing is healed.
    """

    source = "arXiv 2403.17887"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.register_buffer("kept", torch.ones(geometry.routable + 1, geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Find the block for each n on the calibration windows."""
        distance, routable = probe.angular_distance, self.geometry.routable
        self.kept.fill_(1.0)
        for n in range(1, routable + 1):
            start = int(distance.diagonal(n).argmin())  # entry ℓ is d(x_ℓ, x_{ℓ+n})
            self.kept[routable - n, start : start + n] = 0.0

    def score(self, context: Context) -> Tensor:
        """(..., R): 0 for the layers of the block that this K leaves out, 1 for the others."""
        return self.kept[context.executed - self.geometry.always_on]
