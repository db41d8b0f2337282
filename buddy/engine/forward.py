"""One forward pass of a routed model: from the context layer's output to a plan, and what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from buddy.engine.cache import Pool, features
from buddy.engine.select import take
from buddy.plan import Plan
from buddy.router import Context

Score = Callable[[Context], Tensor]


def plan_tokens(scores: Tensor, executed: Tensor, layers: int, shared: int = 0) -> Tensor:
    """(B, T, L) bool from scores (B, T, R) and K (B, T); the first `shared` tokens take the plan of the last of them."""
    runs = Plan.from_scores(scores, executed, layers).runs
    if shared:
        last = runs[:, shared - 1 : shared]
        runs = torch.cat([last.expand(-1, shared, -1), runs[:, shared:]], 1)
    return runs


class Pass:
    """What the layers of a routed model share during one forward.

    Args:
        layers: L.
        context_layer: c; the plan is made after the first c layers ran.
        score: the router's scoring function.
        pool: the running mean that the context is pooled from.
        positions: (B or 1, T) long, position of each token in its own row, padding not counted.
        valid: (B, T) bool, false for padding, or None.
        executed: (B,) long, asked K per row; or None with `runs`.
        sink_tokens: the first positions of each row that run every layer.
        shared: tokens of the prompt that share the plan of their last one; 0 for a plan per token.
        runs: (B, T, L) bool, a plan made elsewhere; the router is not asked.
        gates: (B, T, L) float with gradients for straight-through training, beside `runs`.
        everything: compute each layer on every token and choose afterwards.
    """

    def __init__(
        self,
        *,
        layers: int,
        context_layer: int,
        score: Score,
        pool: Pool,
        positions: Tensor,
        valid: Tensor | None,
        executed: Tensor | None,
        sink_tokens: int,
        shared: int = 0,
        runs: Tensor | None = None,
        gates: Tensor | None = None,
        everything: bool = False,
    ) -> None:
        self.layers, self.context_layer, self.score, self.pool = layers, context_layer, score, pool
        self.positions, self.valid, self.executed = positions, valid, executed
        self.sink_tokens, self.shared = sink_tokens, shared
        self.runs, self.gates, self.everything = runs, gates, everything or gates is not None
        self.context: Context | None = None
        self.scores: Tensor | None = None
        self._counts: list[list[int]] | None = None
        self._ran: dict[int, Tensor | None] = {}
        self._shape: tuple[int, int] | None = None
        self._causal: Tensor | None = None

    def make_plan(self, hidden: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called by the context layer: hidden (B, T, D) as it leaves it, keys and values (B, heads, T, size) it wrote."""
        self._shape = hidden.shape[:2]
        newest = features(keys, values, self.pool.kind)
        pooled = self.pool.add(newest, self.valid)
        executed = self._executed(hidden.shape[:2], hidden.device)
        self.context = Context(pooled=pooled, newest=newest, hidden=hidden.float(), executed=executed)
        if self.runs is None:
            self.runs = self._plan()
        self.runs = self._protect(self.runs)
        self._counts = self.runs.sum(1).t().tolist()  # (L, B): the one host synchronisation of the pass

    def counts(self, layer: int) -> list[int] | None:
        """How many tokens of each row run `layer`; None where all run."""
        if self.runs is None or layer < self.context_layer:
            return None
        counts = self._counts[layer]
        return None if all(count == self._shape[1] for count in counts) else counts

    def record(self, layer: int, chosen: Tensor | None) -> None:
        """A layer says what it ran: (B, T) bool, None for everything."""
        self._ran[layer] = chosen

    def executed_layers(self) -> Tensor:
        """(B, T) long, the layers that each token really ran, as the layers themselves recorded it."""
        total = torch.zeros(self._shape, dtype=torch.long, device=self.positions.device)
        for chosen in self._ran.values():
            total += 1 if chosen is None else chosen
        return total

    def sinks(self) -> Tensor:
        """(B, T) bool, the positions that run at full depth whatever the budget."""
        return (self.positions < self.sink_tokens).expand(self._shape)

    def mask(
        self, mask: Tensor | None, rows: Tensor, positions: Tensor | None, layer: Any, hidden: Tensor
    ) -> Tensor | None:
        """The attention mask (G, 1, n, S) of the queries of one call."""
        batch, length = hidden.shape[:2]
        if mask is None:
            # Stock code leaves the mask out where it is plainly causal; a selection of queries needs it spelt out.
            if positions is None or length == 1:
                return None
            if self._causal is None:
                self._causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None]
            return take(self._causal, rows, positions, batch)[:, None]
        if mask.shape[0] == batch and batch > 1:
            mask = mask[rows]
        if positions is None:
            return mask
        mask = mask.expand(positions.shape[0], *mask.shape[1:])
        index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        return mask.gather(2, index)

    def _executed(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        if self.executed is None:
            return torch.full(shape, self.layers, device=device)
        executed = self.executed.to(device)
        return (executed[:, None] if executed.dim() == 1 else executed).expand(shape)

    def _plan(self) -> Tensor:
        """(B, T, L) bool by the router's scores."""
        if self.executed is None or bool((self.executed == self.layers).all()):
            return torch.ones(*self._shape, self.layers, dtype=torch.bool, device=self.positions.device)
        self.scores = self.score(self.context)
        return plan_tokens(self.scores, self.context.executed, self.layers, self.shared)

    def _protect(self, runs: Tensor) -> Tensor:
        """Full depth for sinks; padding follows its row where the row is whole, and costs nothing elsewhere."""
        if self.sink_tokens:
            runs = runs | self.sinks()[..., None]
        if self.valid is None or bool(self.valid.all()):
            return runs
        padding = ~self.valid[..., None]
        return torch.where(padding, (runs | padding).all(1, keepdim=True), runs)
