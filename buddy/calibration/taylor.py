"""Taylor importance: what the loss would lose, to first order, without a layer's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone import Backbone


def importance(backbone: Backbone, batches: Iterable[Tensor], layers: range, windows: int) -> Tensor:
    """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1).

    Args:
        backbone: no pass is under way in its layers.
        batches: windows (B, T) long.
        layers: the routable ones.
        windows: how many there are.
    """
    weights = [[p for p in backbone.layers[index].parameters() if p.dim() == 2] for index in layers]
    with _with_gradients([parameter for group in weights for parameter in group]), torch.enable_grad():
        for batch in batches:
            (_cross_entropy(backbone.model, batch.to(backbone.device)) * (len(batch) / windows)).backward()
        sums = [_of_all(sum((p * p.grad).abs().sum(dtype=torch.float32) for p in group)) for group in weights]
        return torch.stack(sums).detach().cpu()


def _of_all(total: Tensor) -> Tensor:
    """The sum over all devices, where they share the weights out."""
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def _cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@contextmanager
def _with_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters get gradients within this block, and are frozen again after it."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
