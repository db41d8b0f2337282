"""One forward pass under a layerwise router, which decides on each routable layer when the hidden state arrives at it.

The plan is complete only when the last routable layer was decided, so which tokens run is worked out one layer at a
time. That costs one synchronisation with the device for each layer, which no such router can avoid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from buddy.engine.forward import RoutedForward, Settings, active
from buddy.engine.transfer import to_host
from buddy.errors import BuddyError
from buddy.plan import clamp_gate, deciding_tokens, gate_order
from buddy.router import LayerwiseRouter, in_float32


class LayerwiseForward(RoutedForward):
    """A `RoutedForward` that asks a gate for one layer after the other and holds every token to exactly K layers.

    With `mean_over` above 1 the gates decide alone: a layer is decided for all tokens of a prompt at once, before it is
    known how many layers the earlier of them will run.
    Decisions are shared as scores are: a shared prompt follows its last token, and with `reroute_every` other than 1
    only some tokens decide. If all tokens follow a decision from before these positions, no gate is asked: `gate_order`
    of the gates that were open then gives the plan at once.

    Attributes:
        weights: (B, T) each, of the layers so far, with gradients; of a gate-weighted forward only.
    """

    def __init__(self, settings: Settings, router: LayerwiseRouter, *rest: Any) -> None:
        super().__init__(settings, router, *rest)
        self.routable = settings.layers - settings.context_layer - 1
        self.weights: list[Tensor] = []
        self._asks_gates = False
        self._follows: Tensor | None = None  # (T,) long on the host: the deciding token of each; None: each its own
        self._open_before: Tensor | None = None  # (B, 1, R) bool, the gates of the decision before these tokens
        self._open: list[Tensor] = []  # (B, T) bool each, of the layers so far
        self._remaining: Tensor | None = None  # (B, T) long, routable layers that each token has still to run

    def decide(self, layer: int, hidden: Tensor) -> None:
        """Decide which tokens run an undecided layer, from the hidden state (B, T, D) that arrives at it."""
        index = layer - self.context_layer
        is_open = self._is_open(index, hidden)
        if self.settings.mean_over > 1:
            runs = is_open | (self.context.executed == self.settings.layers)
        else:
            runs = clamp_gate(is_open, self._remaining, self.routable - index)
        self._remaining = self._remaining - runs.long()
        self._open.append(is_open)
        self._runs[..., layer] = runs = self._with_sinks(runs[..., None])[..., 0]
        self.active_rows[layer] = active(to_host(runs.sum(1)), self.shape[1])
        self.undecided = index < self.routable - 1
        if not self.undecided and self.cache is not None and self.settings.reroute_every != 1:  # for those that follow
            self.cache.scores = gate_order(torch.stack([gates[:, -1:] for gates in self._open], -1))

    def weigh(self, layer: int, hidden: Tensor) -> Tensor:
        """(B, T) float32, the weight of an undecided layer in each token's state, with gradients; 1 for sinks."""
        index = layer - self.context_layer
        weight = self.router.weigh(self._ask_gate(index, hidden))
        weight = weight if self._follows is None else weight[:, self._asked_of]
        self.weights.append(weight)
        self.undecided = index < self.routable - 1
        return weight.masked_fill(self.sinks, 1.0)

    def chosen(self, layer: int) -> Tensor:
        """(B, T) bool, the tokens that run `layer`; a copy where autograd keeps it, since `decide` writes the plan."""
        runs = super().chosen(layer)
        return runs.clone() if torch.is_grad_enabled() else runs

    def can_defer(self, layer: int) -> bool:
        """One token's state may be pending; for a prompt it is not known yet in how many layers it would be."""
        return self.shape[1] == 1 if self._asks_gates else super().can_defer(layer)

    def _decide(self, prompt: int, only_last: bool) -> None:
        """Follow the decision from before these tokens where all of them do; else let the layers ask."""
        self._follows = self._deciding_tokens(self.shape[1] if only_last else prompt)
        held = None if self.cache is None or self.settings.reroute_every == 1 else self.cache.scores
        if held is not None and self._follows is not None and to_host(self._follows.max()) < 0:
            return self._run_scores(held.expand(-1, self.shape[1], -1))
        self._begin_gates(held)

    def _counts(self, scores: Tensor) -> Tensor:
        """(B, T) long, layers of each token that follows an earlier decision: K, or its gates that were open then."""
        executed = self.context.executed
        if self.settings.mean_over == 1:
            return executed
        opened = (scores >= self.routable).sum(-1) + self.context_layer + 1
        return torch.where(executed == self.settings.layers, executed, opened)

    def _begin_gates(self, held: Tensor | None) -> None:
        device = self.context.executed.device
        self._asks_gates = self.undecided = True
        self._open_before = None if held is None else held >= self.routable
        executed = self.context.executed.expand(self.shape)
        self._remaining = executed - self.context_layer - 1
        self._runs = torch.ones(*self.shape, self.settings.layers, dtype=torch.bool, device=device)
        self._asking: Any = slice(None)
        if self._follows is not None:  # only tokens that some token follows are asked
            asking, asked_of = self._follows.clamp(min=0).unique(return_inverse=True)
            self._asking, self._asked_of = asking.to(device), asked_of.to(device)
            self._follows_before = (self._follows < 0).to(device)
        self._asked_executed = executed[:, self._asking]
        self.active_rows[self.context_layer : -1] = [None] * self.routable
        self.active_rows[-1] = True

    def _deciding_tokens(self, prompt: int) -> Tensor | None:
        """(T,) long on the host: the token whose decision each follows, negative for one before these tokens."""
        every, length = self.settings.reroute_every, self.shape[1]
        if every == 1 and not prompt:
            return None
        return deciding_tokens(length, 0 if every == 1 else self._first_decision(), every, prompt)

    @torch.no_grad()
    def _is_open(self, index: int, hidden: Tensor) -> Tensor:
        """(B, T) bool: whether the gate of routable layer `index` is open, by the decision that each token follows."""
        logits = self._ask_gate(index, hidden)
        is_open = logits > 0
        if self.settings.batch_plan == "shared":
            is_open = self._mean_over_batch(logits.sigmoid(), self._asking) > 0.5
        if self._follows is None:
            return is_open
        is_open = is_open[:, self._asked_of]
        if self._open_before is None:
            return is_open
        return torch.where(self._follows_before, self._open_before[..., index], is_open)

    def _ask_gate(self, index: int, hidden: Tensor) -> Tensor:
        """(B, n) float32 logits of the tokens that decide; BuddyError where the router gives another shape."""
        asking = hidden[:, self._asking].float()
        with in_float32(hidden.device):
            logits = self.router.gate(index, asking, self._asked_executed)
        if logits.shape != asking.shape[:-1]:
            raise BuddyError(
                f"{type(self.router).__name__} gives gates of shape {(*logits.shape,)}, not {(*asking.shape[:-1],)}; "
                "correct its gate, which `buddy routers check` tests."
            )
        return logits
