"""Reverse order: drop the last layers (Lu et al., 2411.15558)."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Router


class ReverseOrder(Router):
    """Static: the deeper a layer, the lower its score.

    The paper (section 3, "Reverse-order") removes the last n layers. Deviation: the final layer always runs, as for
    every router here, so the n layers before it are dropped, the simple strategy of 2403.17887 (section 4.4), which
    found that the final layer must stay.
    """

    source = "arXiv 2411.15558"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.register_buffer("worth", -torch.arange(geometry.routable, dtype=torch.float32))

    def score(self, context: Context) -> Tensor:
        """(..., R): minus the depth, the same for every token."""
        return self.worth.expand(*context.executed.shape, -1)
