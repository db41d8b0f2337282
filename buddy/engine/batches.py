"""Batches that change while they decode: rows join a routed cache, and leave it.

Rows of a batch end at the same position, so the shorter ones are padded on the left, as transformers pads prompts. Rows
that join come last; where the longest row leaves, the columns that only it used are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.engine.kv_cache import ContextPool, HoleLayer
from buddy.engine.kv_policies import POLICIES
from buddy.engine.model import RoutedLM
from buddy.engine.transfer import to_device


@dataclass
class Batch:
    """Rows that decode together.

    Attributes:
        cache: a routed cache of B rows and S positions.
        mask: (B, S) bool, False for padding.
        owners: B objects, one for each row.
        padded: whether the mask hides something.
    """

    cache: Any
    mask: Tensor
    owners: list[Any]
    padded: bool = False

    @property
    def positions(self) -> Tensor:
        """(B, 1) long, the position of each row's next token."""
        return self.mask.sum(1, keepdim=True)

    def extend(self) -> Tensor | None:
        """The mask (B, S + 1) with one more token in each row, or None where it hides nothing."""
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self.mask if self.padded else None


def join(routed: RoutedLM, batches: Sequence[Batch]) -> Batch:
    """One batch of all rows of several that the same model filled, in order. The given ones are not usable any more.

    Args:
        batches: at least one. Where not every token decides (`reroute_every`), tokens decide in step in all of them.
    """
    if len(batches) == 1:
        return batches[0]
    caches = [batch.cache for batch in batches]
    for cache in caches:
        _flush(routed, cache)
    lengths = [batch.mask.shape[1] for batch in batches]
    shifts = [max(lengths) - length for length in lengths]
    mask = torch.cat([F.pad(b.mask, (shift, 0)) for b, shift in zip(batches, shifts, strict=True)])
    joined = caches[0]
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        if isinstance(parts[0], HoleLayer):
            _join_holes(parts, shifts, [len(batch.owners) for batch in batches])
        elif parts[0].is_initialized:
            _join_rectangles(parts)
    joined.pool = _join_pools([cache.pool for cache in caches], mask)
    joined.scores = _join_scores(
        [(cache.scores, len(batch.owners)) for cache, batch in zip(caches, batches, strict=True)]
    )
    if any(cache.excess is not None for cache in caches):
        none = [mask.new_zeros(len(batch.owners), dtype=torch.long) for batch in batches]
        joined.excess = torch.cat([x if c.excess is None else c.excess for c, x in zip(caches, none, strict=True)])
    decided = [c.decided + shift for c, shift in zip(caches, shifts, strict=True) if c.decided is not None]
    joined.decided = decided[0] if decided else None
    padded = any(shifts) or any(batch.padded for batch in batches)
    return Batch(joined, mask, [owner for batch in batches for owner in batch.owners], padded)


def keep(routed: RoutedLM, batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch with some of its rows only, at least one, and without columns in which all of these are padding."""
    index = to_device(rows, batch.mask.device)
    batch.cache.reorder_cache(index)
    mask = batch.mask[index]
    unused = int((~mask.any(0)).sum())  # padding is on the left
    if unused:
        _drop_first(routed, batch.cache, unused)
    mask = mask[:, unused:]
    return Batch(batch.cache, mask, [batch.owners[row] for row in rows], not bool(mask.all()))


def _flush(routed: RoutedLM, cache: Any) -> None:
    for layer in routed.backbone.layers:
        POLICIES[routed.settings.policy].flush(layer, cache)


def _join_rectangles(layers: Sequence[Any]) -> None:
    """Into the first of these layers of several caches go the rows of all, aligned at the end."""
    first, most = layers[0], max(layer.keys.shape[2] for layer in layers)
    for name in ("keys", "values"):
        states = [getattr(layer, name) for layer in layers]
        setattr(first, name, torch.cat([F.pad(x, (0, 0, most - x.shape[2], 0)) for x in states]))
    if first.is_sliding:
        first.cumulative_length = max(layer.cumulative_length for layer in layers)


def _join_holes(layers: Sequence[HoleLayer], shifts: Sequence[int], rows: Sequence[int]) -> None:
    """`_join_rectangles` where only some positions are stored: they become those that any of the caches stored."""
    first, seen = layers[0], max(layer.seen for layer in layers)
    stored = [
        (layer, shift + layer.slots, slice(end - count, end))
        for layer, shift, count, end in zip(layers, shifts, rows, accumulate(rows), strict=True)
        if layer.slots is not None
    ]
    if stored:
        some, slots = stored[0][0], torch.cat([each for _, each, _ in stored]).unique()
        shape = sum(rows), some.keys.shape[1], len(slots), some.keys.shape[3]
        keys, values = some.keys.new_zeros(shape), some.values.new_zeros(shape)
        valid = some.valid.new_zeros(sum(rows), len(slots))
        for layer, own, part in stored:
            at = torch.searchsorted(slots, own)
            keys[part, :, at], values[part, :, at], valid[part, at] = layer.keys, layer.values, layer.valid
        if not first.is_initialized:
            first.lazy_initialization(keys, values)
        first.keys, first.values, first.valid, first.slots = keys, values, valid, slots
    # Padding on the left is hidden by the stock mask.
    first.seen, first.complete = seen, all(layer.complete for layer in layers)


def _join_pools(pools: Sequence[ContextPool], mask: Tensor) -> ContextPool:
    joined = ContextPool(pools[0].kind)
    joined.total = torch.cat([pool.total for pool in pools])
    joined.count = mask.sum(1, keepdim=True).to(joined.total.dtype)
    return joined


def _join_scores(parts: Sequence[tuple[Tensor | None, int]]) -> Tensor | None:
    """(B, S, R), aligned at the end; a row without scores decides at the next token, by itself."""
    some = [scores for scores, _ in parts if scores is not None]
    if not some:
        return None
    most = max(scores.shape[1] for scores in some)
    held = [some[0].new_empty(rows, 0, some[0].shape[2]) if scores is None else scores for scores, rows in parts]
    return torch.cat([F.pad(scores, (0, 0, most - scores.shape[1], 0), value=-math.inf) for scores in held])


def _drop_first(routed: RoutedLM, cache: Any, count: int) -> None:
    """Drop the first positions of a cache."""
    _flush(routed, cache)
    for layer in cache.layers:
        if isinstance(layer, HoleLayer):
            layer.seen -= count
            if layer.slots is not None:
                layer.slots = layer.slots - count
                layer.keep(layer.slots >= 0)
        elif layer.is_initialized:
            left = layer.keys.shape[2] - count
            if layer.is_sliding:
                layer.cumulative_length -= count
                left = min(layer.keys.shape[2], layer.cumulative_length)
            layer.keys, layer.values = layer.keys[:, :, -left:], layer.values[:, :, -left:]
    if cache.decided is not None:
        cache.decided -= count
