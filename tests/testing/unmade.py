"""A router that cannot be made."""

from torch import Tensor

from buddy import Context, Geometry, Router


class KeyMissing(Router):
    """Raises what nobody foresaw."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.size = {}["x"]

    def score(self, context: Context) -> Tensor:
        """Never asked."""
        return context.hidden


class Leaving(Router):
    """Ends the process."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        raise SystemExit(0)

    def score(self, context: Context) -> Tensor:
        """Never asked."""
        return context.hidden
