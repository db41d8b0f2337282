"""Gates that are asked once for an input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Geometry, LayerwiseRouter


class PromptGates(LayerwiseRouter):
    """Learned: a linear gate for each layer decides for the whole input, at its prompt's last token."""

    kind = "learned"
    scope = "prompt"

    def __init__(self, geometry: Geometry, *, penalty_weight: float = 10.0) -> None:
        super().__init__(geometry)
        self.penalty_weight = penalty_weight
        self.read = nn.Parameter(torch.zeros(geometry.routable, geometry.hidden))
        self.bias = nn.Parameter(torch.ones(geometry.routable))

    def gate(self, index: int, hidden: Tensor, executed: Tensor) -> Tensor:
        """(...) logits."""
        return F.layer_norm(hidden, hidden.shape[-1:]) @ self.read[index] + self.bias[index]

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,): what the mean gate has above the share that is asked for."""
        asked = (executed - self.geometry.always_on) / self.geometry.routable
        return self.penalty_weight * (weights.mean((1, 2)) - asked).clamp(min=0)
