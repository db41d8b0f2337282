"""A router whose plans are known: one of two orders, chosen by the token alone."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Router


class TwoOrders(Router):
    """The earliest layers for tokens whose first hidden number is negative, the latest for the others."""

    def score(self, context: Context) -> Tensor:
        """(..., R)."""
        depth = torch.arange(self.geometry.routable, dtype=torch.float32)
        return torch.where(context.hidden[..., :1] < 0, -depth, depth)


def planted_runs(hidden: Tensor, executed: int, geometry: Geometry, sinks: int) -> list[list[list[bool]]]:
    """N × T × L, what `TwoOrders` has to run, one token and one layer at a time."""
    found = []
    for row in hidden:
        plans = []
        for position, state in enumerate(row):
            routable = list(range(geometry.context_layer, geometry.layers - 1))
            kept = executed - geometry.always_on
            chosen = routable[:kept] if state[0] < 0 else routable[len(routable) - kept :]
            always = [*range(geometry.context_layer), geometry.layers - 1]
            plans.append([position < sinks or layer in (*chosen, *always) for layer in range(geometry.layers)])
        found.append(plans)
    return found
