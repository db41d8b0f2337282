"""A random order of layers, drawn once."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Router


class RandomRouter(Router):
    """Keeps the first layers of one random order, drawn once per run from `seed`."""

    kind = "random"

    def __init__(self, geometry: Geometry, *, seed: int = 0) -> None:
        super().__init__(geometry)
        order = torch.randperm(geometry.routable, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("order", order.float())

    def score(self, context: Context) -> Tensor:
        """(..., R): the same order for every token, so plans nest as the budget grows."""
        return self.order.expand(*context.executed.shape, -1)
