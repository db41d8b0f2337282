"""The running mean of a context layer's cached states: what routers know of the prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def features(keys: Tensor, values: Tensor, kind: str) -> Tensor:
    """Cached states (B, heads, T, size) as (B, T, F) float32: F = heads × size, twice that for "both"."""
    chosen = {"value": (values,), "key": (keys,), "both": (keys, values)}[kind]
    flat = [states.transpose(1, 2).flatten(2) for states in chosen]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, -1)).float()


class Pool:
    """Running sum, per row, of the states of all valid positions so far.

    Attributes:
        kind: which states are pooled: "value", "key" or "both".
        total: (B, F) float32, or None before the first token.
        count: positions in the sum, one number while no row was ever padded, else (B, 1) float32.
        valid: (B, positions) bool once a row was padded, to take back what a crop removes; None before.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.total: Tensor | None = None
        self.count: float | Tensor = 0.0
        self.valid: Tensor | None = None

    def add(self, states: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over each prefix, (B, T, F) float32, of states (B, T, F); positions not `valid` (B, T) are left out."""
        if valid is None and self.valid is None:
            return self._add_all(states)
        batch, length, _ = states.shape
        if self.valid is None:
            self.valid = torch.ones(batch, int(self.count), dtype=torch.bool, device=states.device)
            self.count = torch.full((batch, 1), float(self.count), device=states.device)
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=states.device)
        self.valid = torch.cat([self.valid, valid], 1)
        totals = self._onto((states * valid[..., None]).cumsum(1))
        counts = valid.to(states.dtype).cumsum(1) + self.count
        self.total, self.count = totals[:, -1], counts[:, -1:]
        return totals / counts.clamp(min=1)[..., None]

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows, as beams do."""
        if self.total is None:
            return
        self.total = self.total[rows]
        if self.valid is not None:
            self.valid, self.count = self.valid[rows], self.count[rows]  # type: ignore[index]  # a tensor with valid

    def crop(self, removed: int, keys: Tensor, values: Tensor) -> None:
        """Take back the last `removed` positions; their keys and values (B, heads, removed, size) are given."""
        gone = features(keys, values, self.kind)
        if self.valid is None:
            self.total, self.count = self.total - gone.sum(1), self.count - removed
            return
        weight = self.valid[:, -removed:].to(gone.dtype)
        self.total = self.total - (gone * weight[..., None]).sum(1)
        self.count = self.count - weight.sum(1, keepdim=True)
        self.valid = self.valid[:, :-removed]

    def _add_all(self, states: Tensor) -> Tensor:
        length = states.shape[1]
        if length == 1:  # the decode step: two small sums
            self.total = states[:, 0] if self.total is None else self.total + states[:, 0]
            self.count += 1
            return (self.total / self.count)[:, None]
        totals = self._onto(states.cumsum(1))
        counts = torch.arange(1, length + 1, device=states.device) + self.count
        self.total, self.count = totals[:, -1], self.count + length
        return totals / counts[:, None]

    def _onto(self, totals: Tensor) -> Tensor:
        return totals if self.total is None else totals + self.total[:, None]


def rebuilt(kind: str, layer: Any, valid: Tensor | None) -> Pool:
    """The pool of a context layer's cache that was filled without one; `valid` (B, positions) marks padding."""
    pool = Pool(kind)
    pool.add(features(layer.keys, layer.values, kind), valid)
    return pool
