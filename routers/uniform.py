"""Evenly spaced layers: the simplest baseline."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Router


class UniformRouter(Router):
    """Static: keeps evenly spaced layers, another set for each budget."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        routable = geometry.routable
        kept = torch.zeros(routable + 1, routable)
        for k in range(1, routable + 1):
            # The middles of k equal intervals, rounded down: distinct.
            kept[k, ((torch.arange(k) + 0.5) * routable / k).long()] = 1.0
        self.register_buffer("kept", kept)

    def score(self, context: Context) -> Tensor:
        """(..., R): 1 for the layers of the set for this K, 0 for the others."""
        return self.kept[context.executed - self.geometry.always_on]
