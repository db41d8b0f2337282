"""Full depth: the dense model, as a row of every comparison."""

import torch
from torch import Tensor

from buddy import Context, Router


class FullDepth(Router):
    """Static: runs every layer; accepts no budget below 1.0."""

    full_depth = True

    def score(self, context: Context) -> Tensor:
        """Zeros (..., R): no layer is ever skipped."""
        return torch.zeros(*context.executed.shape, self.geometry.routable, device=context.executed.device)
