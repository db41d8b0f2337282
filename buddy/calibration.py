"""`Probe`: what a router may measure on the calibration windows before use.

One probe serves all routers of a recipe, so they see the same windows, and what one measured is not measured again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.engine.model import RoutedLM

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def _silent(items: Sequence[Any], _: str) -> Iterable[Any]:
    return items


class Probe:
    """Measures a frozen model on calibration windows.

    Args:
        routed: the model; its router is not asked, only plans given here are run.
        windows: (N, W) long, calibration tokens.
        batch_size: windows per forward.
        track: wraps a loop to show progress, given what it runs over and a few words.
    """

    def __init__(self, routed: RoutedLM, windows: Tensor, batch_size: int = 4, track: Track = _silent) -> None:
        self.routed, self.geometry = routed, routed.geometry
        self._batches, self._windows = windows.split(batch_size), len(windows)
        self._track = track

    @cached_property
    @torch.no_grad()
    def block_influence(self) -> Tensor:
        """(R,) float32: 1 − E[cos(h_in, h_out)] over tokens (ShortGPT, 2403.03853, eq. 1), sinks left out."""
        first, routable, sinks = self.geometry.context_layer, self.geometry.routable, self.routed.sink_tokens
        total, count = torch.zeros(routable, device=self.routed.backbone.device), 0
        for batch in self._track(self._batches, "block influence"):
            batch = batch.to(total.device)
            states = self.routed.backbone.model(
                batch, use_cache=False, output_hidden_states=True, logits_to_keep=1
            ).hidden_states
            for i in range(routable):
                before, after = (states[first + i + j][:, sinks:].float() for j in (0, 1))
                total[i] += F.cosine_similarity(before, after, dim=-1).sum()
            count += batch[:, sinks:].numel()
        return (1 - total / count).cpu()

    @cached_property
    def loss_increase(self) -> Tensor:
        """(R,) float32: rise of the perplexity when one layer is skipped (Shortened LLaMA, 2402.02834, section 3.2)."""
        dense = self.loss(self._without(None))
        layers = self._track(range(self.geometry.routable), "perplexity without a layer")
        skipped = [self.loss(self._without(i)) for i in layers]
        return torch.tensor(skipped).exp() - torch.tensor(dense).exp()

    @cached_property
    def taylor(self) -> Tensor:
        """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1)."""
        first = self.geometry.context_layer
        layers = self.routed.backbone.layers[first : first + self.geometry.routable]
        weights = [[p for p in layer.parameters() if p.dim() == 2] for layer in layers]
        for parameter in reduce(operator.iadd, weights, []):
            parameter.requires_grad_(True)
        try:
            for batch in self._track(self._batches, "Taylor importance"):
                with torch.enable_grad():
                    (self._cross_entropy(batch, None) * (len(batch) / self._windows)).backward()
            return torch.stack(
                [sum((p * p.grad).abs().sum(dtype=torch.float32) for p in group) for group in weights]
            ).cpu()
        finally:
            for parameter in reduce(operator.iadd, weights, []):
                parameter.requires_grad_(False).grad = None

    @torch.no_grad()
    def loss(self, runs: Tensor) -> float:
        """Mean next-token cross-entropy in nats under one plan for all tokens, runs (L,) bool."""
        losses = [self._cross_entropy(batch, runs) * len(batch) for batch in self._batches]
        return (sum(losses) / self._windows).item()

    def _cross_entropy(self, batch: Tensor, runs: Tensor | None) -> Tensor:
        batch = batch.to(self.routed.backbone.device)
        if runs is None:
            logits = self.routed.backbone.model(batch, use_cache=False).logits
        else:
            plan = runs.to(batch.device).expand(*batch.shape, -1)
            logits = self.routed(batch, runs=plan).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    def _without(self, index: int | None) -> Tensor:
        runs = torch.ones(self.geometry.layers, dtype=torch.bool)
        if index is not None:
            runs[self.geometry.context_layer + index] = False
        return runs
