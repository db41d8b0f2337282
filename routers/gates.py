"""What layerwise routers share: budgets, straight-through gates, and offsets by budget; no router itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Geometry

SHIFT = 5.0  # difference of the logits between a budget of all layers and of none, before training


def normalised(hidden: Tensor) -> Tensor:
    """(..., D): layer norm without weights, since the scale of states differs a hundredfold between layers."""
    return F.layer_norm(hidden, hidden.shape[-1:])


def share(executed: Tensor, geometry: Geometry) -> Tensor:
    """(...) float32, k / R: the share of the routable layers that run, for K (...)."""
    return (executed - geometry.always_on) / geometry.routable


def straight_through(logits: Tensor) -> Tensor:
    """(...): 1 where a gate is open and 0 where it is closed, with the gradient of its probability."""
    probability = logits.sigmoid()
    return (logits > 0).float() + probability - probability.detach()


class Offsets(nn.Module):
    """b_i + c_i · (k / R − 1): what each gate adds to its logits, so that one router serves all budgets.

    Args:
        geometry: sizes of the backbone.
        start: b_i before training; 3 is a probability of 0.95 at full depth, nearly the dense model.
    """

    def __init__(self, geometry: Geometry, start: float) -> None:
        super().__init__()
        self.geometry = geometry
        self.bias = nn.Parameter(torch.full((geometry.routable,), float(start)))
        self.shift = nn.Parameter(torch.full((geometry.routable,), SHIFT))

    def forward(self, index: int, executed: Tensor) -> Tensor:
        """(...) for K (...) and routable layer `index`."""
        return self.bias[index] + self.shift[index] * (share(executed, self.geometry) - 1)


def parameter_groups(weights: list[nn.Parameter], offsets: Offsets) -> list[dict]:
    """Step sizes by fan-in: a gate sums over many weights, but has one bias and one shift."""
    return [{"params": weights, "scale": 0.2}, {"params": list(offsets.parameters()), "scale": 20.0}]


def check_not_negative(**options: float) -> None:
    """Refuse an option below 0.

    Raises:
        ValueError: there is one.
    """
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; give 0 or more")
