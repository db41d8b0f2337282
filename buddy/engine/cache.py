"""Caches as the layers of a routed model see them.

`RoutedState` rides on an ordinary transformers cache and follows what generation does to it (beams, crops, repeats).
`Capture` and `RowsAndTokens` stand in for the cache while one layer runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from buddy.engine.select import Group


class Pool:
    """Running sum of a context layer's cached states, per row: what the mean over the prefix needs.

    Attributes:
        total: (B, F) float32, the sum over the valid positions so far; None before the first token.
        count: (B,) float32, how many positions are in it.
        layer: index of the context layer, whose cache gives back what a crop removes.
        kind: which states are pooled: "value", "key" or "both".
    """

    def __init__(self, layer: int, kind: str) -> None:
        self.layer, self.kind = layer, kind
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.valid: Tensor | None = None  # (B, positions) bool, needed to take back what a crop removes

    def add(self, states: Tensor, valid: Tensor | None) -> Tensor:
        """Means over each prefix, (B, T, F) float32, of states (B, T, F); positions not `valid` (B, T) are left out."""
        batch, length, _ = states.shape
        valid = torch.ones(batch, length, dtype=torch.bool, device=states.device) if valid is None else valid
        weight = valid.to(states.dtype)
        totals = (states * weight[..., None]).cumsum(1)
        counts = weight.cumsum(1)
        if self.total is not None:
            totals, counts = totals + self.total[:, None], counts + self.count[:, None]
        self.total, self.count = totals[:, -1], counts[:, -1]
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], 1)
        return totals / counts.clamp(min=1)[..., None]

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows, as beams do."""
        if self.total is not None:
            self.total, self.count, self.valid = self.total[rows], self.count[rows], self.valid[rows]

    def crop(self, removed: int, layer: Any) -> None:
        """Take back the last `removed` positions; `layer` still holds their keys and values."""
        if self.total is None or removed == 0:
            return
        gone = features(layer.keys[..., -removed:, :], layer.values[..., -removed:, :], self.kind)
        weight = self.valid[:, -removed:].to(gone.dtype)
        self.total = self.total - (gone * weight[..., None]).sum(1)
        self.count = self.count - weight.sum(1)
        self.valid = self.valid[:, :-removed]


def features(keys: Tensor, values: Tensor, kind: str) -> Tensor:
    """Cached states (B, kv heads, T, head size) as (B, T, F) float32: F = kv heads × head size, twice that for "both"."""
    chosen = {"value": [values], "key": [keys], "both": [keys, values]}[kind]
    return torch.cat([states.transpose(1, 2).flatten(2) for states in chosen], -1).float()


class _RoutedCache:
    """Mixed into the class of a cache that a routed model has adopted."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.pool.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.pool.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pool.total is not None:
            rows = torch.arange(self.pool.total.shape[0], device=self.pool.total.device)
            self.pool.select(rows.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:  # a positive number is refused by transformers itself
            self.pool.crop(-tokens_to_remove, self.layers[self.pool.layer])
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.pool = Pool(self.pool.layer, self.pool.kind)


_ADOPTED: dict[type, type] = {}


def adopt(cache: Any, layer: int, kind: str) -> Pool:
    """The pool that rides on `cache`, made at its first use: the cache's class is swapped for a subclass."""
    if not isinstance(cache, _RoutedCache):
        stock = type(cache)
        if stock not in _ADOPTED:
            _ADOPTED[stock] = type(f"Routed{stock.__name__}", (_RoutedCache, stock), {"__module__": __name__})
        cache.__class__ = _ADOPTED[stock]
        cache.pool = Pool(layer, kind)
    return cache.pool


class Capture:
    """Stands in for the cache of the context layer and keeps the newest keys and values, each (B, heads, T, size)."""

    def __init__(self, cache: Any | None) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Record, then do what the cache does."""
        self.keys, self.values = keys, values
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer, *args, **kwargs)


class RowsAndTokens:
    """Stands in for the cache while a layer runs on some rows and tokens.

    The layer hands over the K/V of the tokens it runs on; the other tokens of those rows get theirs from `rest`. The
    layer gets back everyone's, in order of position, after what `past` holds; `new` keeps them for the real cache.
    """

    def __init__(self, group: Group, rest: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None) -> None:
        self.group, self.rest, self.past = group, rest, past
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Everyone's keys and values, each (G, heads, past + T, size), for G rows."""
        self.new = (self._ordered(keys, 0), self._ordered(values, 1))
        if self.past is None:
            return self.new
        return tuple(torch.cat([past, new], -2) for past, new in zip(self.past, self.new, strict=True))

    def _ordered(self, run: Tensor, which: int) -> Tensor:
        if self.group.order is None:
            return run
        both = run if self.rest is None else torch.cat([run, self.rest[which]], -2)
        index = self.group.order.argsort(1)[:, None, :, None].expand(both.shape)
        return both.gather(2, index)
