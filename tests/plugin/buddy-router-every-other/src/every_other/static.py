"""Every other layer goes first."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Router


class EveryOther(Router):
    """Drops every other layer first, then the rest from one end."""

    source = "a stranger"

    def __init__(self, geometry: Geometry, *, odd: bool = True) -> None:
        super().__init__(geometry)
        layers = torch.arange(geometry.routable)
        self.register_buffer("worth", (layers % 2 == int(odd)).float() * geometry.routable - layers)

    def score(self, context: Context) -> Tensor:
        """(..., R): the same for every token."""
        return self.worth.expand(*context.executed.shape, -1)
