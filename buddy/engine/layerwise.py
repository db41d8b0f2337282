"""One forward pass under a layerwise router: each routable layer is decided when the hidden state arrives at it.

The plan is known no sooner than the layers run, so what the layers need to know of it is worked out one layer at a
time. That takes one wait for the device a layer, which no such router can do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from buddy.engine.forward import RoutedForward, Settings, deciders, row_summary
from buddy.plan import gate_order
from buddy.router import LayerwiseRouter


class LayerwiseForward(RoutedForward):
    """A `RoutedForward` that asks a gate for one layer after the other and holds every token to exactly K layers.

    Whose gates hold for whom is as for scores: a shared prompt follows its last token, and `reroute_every` other than 1
    lets only some tokens decide. Tokens that all follow a decision from before these positions need no gate at all:
    `gate_order` of the gates that were open then gives the plan at once.

    Attributes:
        weights: (B, T) each, of the layers so far, with gradients; of a weighted pass only.
    """

    def __init__(self, settings: Settings, router: LayerwiseRouter, *rest: Any) -> None:
        super().__init__(settings, None, *rest)
        self.router = router
        self.weights: list[Tensor] = []
        self._gated = False  # whether gates are asked in this pass
        self._at: Tensor | None = None  # (T,) long on the host, whose decision each token follows; None: its own
        self._before: Tensor | None = None  # (B, 1, R) bool, gates that were open at the decision before these tokens
        self._open: list[Tensor] = []  # (B, T) bool each, of the layers so far
        self._columns: dict[int, Tensor] = {}  # layer → (B, T) bool, the tokens that run it
        self._remaining: Tensor | None = None  # (B, T) long, routable layers that each token has still to run

    def decide(self, layer: int, hidden: Tensor) -> None:
        """Called by a layer that is undecided, with the hidden state (B, T, D) that arrives: who runs it."""
        index, routable = layer - self.context_layer, self.settings.layers - self.context_layer - 1
        is_open = self._opened(index, hidden)
        runs = (is_open & (self._remaining > 0)) | (self._remaining == routable - index)
        self._remaining = self._remaining - runs.long()
        self._open.append(is_open)
        self._columns[layer] = runs = self._with_sinks(runs)
        if not self.compute_all_layers:
            self.active_rows[layer] = row_summary(runs.sum(1).tolist(), self.shape[1])
        if index == routable - 1:
            self._finish()

    def weigh(self, layer: int, hidden: Tensor) -> Tensor:
        """(B, T) float32, the weight of an undecided layer in each token's state, with gradients; 1 for sinks."""
        index = layer - self.context_layer
        weight = self.router.weigh(self._asked_gate(index, hidden))
        weight = weight if self._at is None else weight[:, self._back]
        self.weights.append(weight)
        self.undecided = index < self.settings.layers - self.context_layer - 2
        return weight.masked_fill(self._sinks, 1.0)

    def chosen(self, layer: int) -> Tensor:
        """(B, T) bool, the tokens that run `layer`."""
        return self._columns[layer] if layer in self._columns else super().chosen(layer)

    def can_defer(self, layer: int) -> bool:
        """One token's state always may; of a prompt's it is not known yet how many layers it would wait in."""
        return self.shape[1] == 1 if self._gated else super().can_defer(layer)

    def _decide(self, prompt: int, only_last: bool) -> None:
        """Follow the decision from before these tokens where all of them do; else leave it to the layers."""
        self._at = self._followed(self.shape[1] if only_last else prompt)
        held = None if self.cache is None or self.settings.reroute_every == 1 else self.cache.scores
        if held is not None and self._at is not None and int(self._at.max()) < 0:
            self.scores = held.expand(-1, self.shape[1], -1)
            return self._follow(prompt)
        self._begin_gates(held)

    def _begin_gates(self, held: Tensor | None) -> None:
        settings, device = self.settings, self.context.executed.device
        routable = settings.layers - self.context_layer - 1
        self._gated = self.undecided = True
        self._before = None if held is None else held >= routable
        self._sinks = self.sinks()
        self._padding = None if self.valid is None or bool(self.valid.all()) else ~self.valid
        executed = self.context.executed.expand(self.shape)
        self._remaining = executed - self.context_layer - 1
        self._asking, self._executed = slice(None), executed
        if self._at is not None:  # only those are asked whom somebody follows
            asking, back = self._at.clamp(min=0).unique(return_inverse=True)
            self._asking, self._back, self._follows = asking.to(device), back.to(device), (self._at < 0).to(device)
            self._executed = executed[:, self._asking]
        self.active_rows[self.context_layer : -1] = [None] * routable
        self.active_rows[-1] = None if self.compute_all_layers else True

    def _followed(self, prompt: int) -> Tensor | None:
        """(T,) long on the host: whose decision each token follows, negative for the one before these tokens."""
        every, length = self.settings.reroute_every, self.shape[1]
        if every == 1 and not prompt:
            return None
        at = torch.arange(length) if every == 1 else deciders(length, self._first_decision(self.cache), every)
        at[:prompt] = at[prompt - 1].clone() if prompt else 0
        return at

    @torch.no_grad()
    def _opened(self, index: int, hidden: Tensor) -> Tensor:
        """(B, T) bool: whose gate of routable layer `index` is open, by the decisions that hold."""
        logits = self._asked_gate(index, hidden)
        is_open = logits > 0
        if self.settings.batch_plan == "shared":
            is_open = self._mean_of_rows(logits.sigmoid()) > 0.5
        if self._at is None:
            return is_open
        is_open = is_open[:, self._back]
        if self._before is None:
            return is_open
        return torch.where(self._follows, self._before[..., index], is_open)

    def _asked_gate(self, index: int, hidden: Tensor) -> Tensor:
        """(B, n) float32 logits, of the tokens that decide."""
        return self.router.gate(index, hidden[:, self._asking].float(), self._executed)

    def _mean_of_rows(self, gates: Tensor) -> Tensor:
        """One gate for the batch, the mean over the rows that have a token there."""
        if self.valid is None:
            return gates.mean(0, keepdim=True).expand_as(gates)
        weight = self.valid[:, self._asking].to(gates)
        return ((gates * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)).expand_as(gates)

    def _with_sinks(self, runs: Tensor) -> Tensor:
        """One layer of a plan, (B, T), as `_completed` would have it."""
        runs = runs | self._sinks
        if self._padding is not None:
            runs = torch.where(self._padding, (runs | self._padding).all(1, keepdim=True), runs)
        return runs

    def _finish(self) -> None:
        """All layers are decided: the plan is whole, and the last decision is kept for tokens that follow it."""
        self.undecided = False
        always = torch.ones_like(self._sinks)
        self._runs = torch.stack([self._columns.get(layer, always) for layer in range(self.settings.layers)], -1)
        if self.cache is None or self.settings.reroute_every == 1:
            return
        self.cache.scores = gate_order(torch.stack([gates[:, -1:] for gates in self._open], -1))
        if self._at is not None and self._at[-1] >= 0:
            self.cache.decision = self.past + int(self._at[-1])
