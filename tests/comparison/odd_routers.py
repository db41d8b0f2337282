"""Routers that fail, for `name: module:Class`."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router


class Fails(Router):
    """Fails in one of four ways."""

    def __init__(self, geometry: Geometry, *, way: str = "score") -> None:
        super().__init__(geometry)
        self.way = way

    def calibrate(self, probe: Probe) -> None:
        """Fail, if that is the way."""
        if self.way == "calibrate":
            raise RuntimeError("the measure went wrong\nin its second line")

    def score(self, context: Context) -> Tensor:
        """Fail."""
        shape = *context.executed.shape, self.geometry.routable
        if self.way == "not finite":
            return torch.full(shape, torch.nan)
        if self.way == "few":
            return torch.zeros(shape)[..., 1:]
        raise ValueError("no score today")


class Forgets(Router):
    """Has a state that a run cannot save."""

    def __init__(self, geometry: Geometry, *, way: str = "attribute") -> None:
        super().__init__(geometry)
        self.way, self.order = way, torch.arange(geometry.routable, dtype=torch.float32)
        if way == "expanded buffer":
            self.register_buffer("worth", self.order.expand(2, -1))

    def calibrate(self, probe: Probe) -> None:
        """Find another order."""
        self.order = -self.order

    def score(self, context: Context) -> Tensor:
        """By the order."""
        return self.order.expand(*context.executed.shape, -1)
