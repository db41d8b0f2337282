"""Routers that fail, for `name: module:Class`."""

from torch import Tensor

from buddy import Context, Geometry, Probe, Router


class Fails(Router):
    """Fails in one of two ways."""

    def __init__(self, geometry: Geometry, *, way: str = "score") -> None:
        super().__init__(geometry)
        self.way = way

    def calibrate(self, probe: Probe) -> None:
        """Fail, if that is the way."""
        if self.way == "calibrate":
            raise RuntimeError("the measure went wrong\nin its second line")

    def score(self, context: Context) -> Tensor:
        """Fail."""
        raise ValueError("no score today")
