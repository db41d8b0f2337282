"""A tiny model whose layers matter differently, and the loss of any plan by brute force on the stock model."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy import Router
from buddy.backbone.load import Backbone, fingerprint
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import reference_logits
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 12  # ten of them routable, so that 210 sets leave out four
WINDOWS = torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(0))
SINKS = 1


def uneven_backbone(seed: int = 0) -> Backbone:
    """A tiny Llama of 12 layers, each writing into the residual stream with a strength of its own."""
    model = tiny_model("llama", seed, num_hidden_layers=LAYERS)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        strength = 0.5 * torch.randn((), generator=generator).exp()
        layer.self_attn.o_proj.weight.mul_(strength)
        layer.mlp.down_proj.weight.mul_(strength)
    return Backbone("uneven", model, tiny_tokenizer(), fingerprint(model))


def calibrated(
    cls: type[Router],
    seed: int = 0,
    *,
    asked: Sequence[int] = (),
    draw: int = 0,
    context_layer: int = 1,
    **options: Any,
) -> Any:
    """A router calibrated on `uneven_backbone(seed)` and `WINDOWS`; `asked` and `draw` are the probe's K and seed."""
    backbone = uneven_backbone(seed)
    router = cls(geometry_of(backbone, context_layer), **options)
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 2, asked=asked, seed=draw))
    return router


class BruteForce:
    """Losses of plans on a stock model: no prefix is shared, nothing is remembered."""

    def __init__(self, seed: int = 0, windows: Tensor = WINDOWS) -> None:
        self.model, self.windows = uneven_backbone(seed).model, windows
        self.dense = self.model(windows).logits

    def logits(self, removed: Collection[int]) -> Tensor:
        """(N, T, V) with routable layers left out."""
        runs = torch.ones(*self.windows.shape, LAYERS, dtype=torch.bool)
        runs[:, SINKS:, [1 + layer for layer in removed]] = False
        return reference_logits(self.model, self.windows, runs)

    def ce(self, removed: Collection[int]) -> float:
        """Next-token cross-entropy, nats a token."""
        return F.cross_entropy(self.logits(removed)[:, :-1].flatten(0, 1), self.windows[:, 1:].flatten()).item()

    def kl(self, removed: Collection[int]) -> float:
        """KL(dense ‖ plan), nats a token."""
        truth, given = self.dense[:, :-1].log_softmax(-1), self.logits(removed)[:, :-1].log_softmax(-1)
        return (truth.exp() * (truth - given)).sum(-1).mean().item()
