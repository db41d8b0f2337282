"""What layerwise routers share: a budget that shifts their gates, and hard gates; no router itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Geometry, LayerwiseRouter

SHIFT = 5.0  # difference of the logits between a budget of all layers and of none, before training


class GateRouter(LayerwiseRouter):
    """Learned gates, hard in training; k / R shifts each of them, so that one router serves all budgets.

    The logits of gate i are `logits` + b_i + c_i · (k / R − 1). A subclass has `logits`, and the parameters for it.

    Args:
        geometry: sizes of the backbone.
        start: b_i before training; 3 is a probability of 0.95 at full depth, nearly the dense model.
        budget_aware: whether there is a c_i.
    """

    kind = "learned"

    def __init__(self, geometry: Geometry, start: float, budget_aware: bool = True) -> None:
        super().__init__(geometry)
        self.bias = nn.Parameter(torch.full((geometry.routable,), float(start)))
        self.shift = nn.Parameter(torch.full((geometry.routable,), SHIFT)) if budget_aware else None

    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """(...) for routable layer `index` and states (..., D) float32."""
        raise NotImplementedError

    def gate(self, index: int, hidden: Tensor, executed: Tensor) -> Tensor:
        """(...): `logits`, shifted by the budget."""
        logits = self.logits(index, hidden) + self.bias[index]
        return logits if self.shift is None else logits + self.shift[index] * (self.share(executed) - 1)

    def weigh(self, logits: Tensor) -> Tensor:
        """(...): 1 where a gate is open and 0 where it is closed, with the gradient of its probability."""
        probability = logits.sigmoid()
        return (logits > 0).float() + probability - probability.detach()

    def share(self, executed: Tensor) -> Tensor:
        """(...) float32, k / R: the share of the routable layers that run, for K (...)."""
        return (executed - self.geometry.always_on) / self.geometry.routable

    def parameter_groups(self) -> list[dict]:
        """Step sizes by fan-in: a gate sums over many weights, but has one bias and one shift."""
        alone = [each for name, each in self.named_parameters() if name in ("bias", "shift")]
        weights = [each for name, each in self.named_parameters() if name not in ("bias", "shift")]
        return [{"params": weights, "scale": 0.2}, {"params": alone, "scale": 20.0}]


class LinearGates(GateRouter):
    """A linear gate for each layer, which sees the normalised state: `logits` are w_i · N(h)."""

    def __init__(self, geometry: Geometry, start: float, budget_aware: bool = True) -> None:
        super().__init__(geometry, start, budget_aware)
        self.weight = nn.Parameter(torch.zeros(geometry.routable, geometry.hidden))

    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """(...): w_i · N(h)."""
        return normalised(hidden) @ self.weight[index]


def normalised(hidden: Tensor) -> Tensor:
    """(..., D): layer norm without weights, since the scale of states differs a hundredfold between layers."""
    return F.layer_norm(hidden, hidden.shape[-1:])


def check_least(least: int, **options: float | None) -> None:
    """Refuse an option below `least`; None passes.

    Raises:
        ValueError: there is one.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")
