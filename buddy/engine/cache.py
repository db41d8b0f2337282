"""The cache of a routed model: an ordinary transformers cache with room to grow and states that wait.

A cache is adopted at its first use: its class is swapped for a subclass and its layers for those of `cachelayers`, so
generation's beams, crops and copies go through it as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from buddy.engine.cachelayers import GrowingLayer, HoleLayer, OwingLayer, SlidingLayer, each
from buddy.engine.pool import Pool, rebuilt
from buddy.errors import BuddyError


class RoutedCache:
    """Mixed into the class of a cache that a routed model has adopted.

    Attributes:
        pool: what the context is pooled from.
        context: index of the context layer.
        policy: the name of the policy that filled it.
        scores: (B, 1, R) the scores of the last decision, for those who do not decide at every token; or None.
        model: fingerprint of the backbone that filled it.
        decided: position of the prompt's last token, from which decisions are counted; None before there is one.
        decision: position of the token that `scores` are of.
    """

    pool: Pool
    context: int
    policy: str
    scores: Tensor | None
    model: Any
    decided: int | None
    decision: int | None

    def select_rows(self, rows: Tensor) -> None:
        """Rows of everything that rides on the cache."""
        self.pool.select(rows)
        if self.scores is not None:
            self.scores = self.scores[rows]
        moved: dict[Any, Any] = {}  # a state waits in every layer of a run, and embeddings with many states
        for layer in self.layers:
            layer.owed = [
                (_rows(h, rows, moved), each(e, lambda x: _rows(x, rows, moved) if x.shape[0] > 1 else x))
                for h, e in layer.owed
            ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.pool.total is not None:
            rows = torch.arange(self.pool.total.shape[0], device=self.pool.total.device)
            self.select_rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.pool.total is not None:  # transformers itself refuses positive numbers
            held = self.layers[self.context]
            self.pool.crop(-tokens_to_remove, *(x[..., tokens_to_remove:, :] for x in (held.keys, held.values)))
            kept = held.get_seq_length() + tokens_to_remove
            if self.decision is not None and self.decision >= kept:
                self.scores = None  # the token that decided is gone
            if self.decided is not None and self.decided >= kept:
                self.decided = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.pool = Pool(self.pool.kind)
        self.scores = self.decided = self.decision = None


_ADOPTED: dict[type, type] = {}
_LAYERS: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: SlidingLayer}


def adopt(
    cache: Any, *, layers: int, context: int, kind: str, policy: str, model: str, valid: Tensor | None = None
) -> RoutedCache:
    """`cache` made fit for routing, in place; what it already holds stays.

    Args:
        cache: a DynamicCache of this model.
        layers: L.
        context: index of the context layer.
        kind: which of its states are pooled.
        policy: "fill", "hole" or "zero".
        model: the backbone's fingerprint.
        valid: (B, positions held) bool, where rows were padded.

    Raises:
        BuddyError: a cache of another kind, of another model, or filled under another policy.
    """
    if isinstance(cache, RoutedCache):
        if (
            cache.model != model
            or cache.policy != policy
            or cache.context != context
            or cache.pool.kind != kind
            or len(cache.layers) != layers
        ):
            raise BuddyError(
                f"This cache was filled by another model or policy ({cache.policy!r}, this one has {policy!r}); "
                "start with an empty cache."
            )
        return cache
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= _LAYERS.keys() or len(cache.layers) != layers:
        found = ", ".join(sorted(each.__name__ for each in kinds))
        raise BuddyError(
            f"Routing needs a DynamicCache of {layers} layers, but was given {type(cache).__name__} with "
            f"{len(cache.layers)} layers ({found}); leave the cache out or make it with DynamicCache(config=…)."
        )
    return _adopted(cache, context, kind, policy, model, valid)


def _adopted(cache: Any, context: int, kind: str, policy: str, model: str, valid: Tensor | None) -> RoutedCache:
    stock = type(cache)
    if stock not in _ADOPTED:
        _ADOPTED[stock] = type(f"Routed{stock.__name__}", (RoutedCache, stock), {"__module__": __name__})
    held = cache.get_seq_length(context)
    cache.layers[:] = [_adopted_layer(layer, policy) for layer in cache.layers]
    cache.__class__ = _ADOPTED[stock]
    if held:
        stored = cache.layers[context].keys.shape[2]  # a sliding layer forgot the rest
        cache.pool = rebuilt(kind, cache.layers[context], None if valid is None else valid[:, -stored:])
    else:
        cache.pool = Pool(kind)
    cache.context, cache.policy, cache.model = context, policy, model
    cache.scores = cache.decided = cache.decision = None
    return cache


def _adopted_layer(layer: Any, policy: str) -> OwingLayer:
    kind: Any = HoleLayer if policy == "hole" else _LAYERS[type(layer)]
    adopted = kind.__new__(kind)
    adopted.__dict__.update(layer.__dict__, owed=[], view=None)
    if kind is HoleLayer:
        adopted.is_sliding, adopted.window = layer.is_sliding, getattr(layer, "sliding_window", None)
        adopted.seen, adopted.unbroken = layer.get_seq_length(), True
        held = layer.keys.shape[2] if adopted.seen else 0
        device = layer.keys.device if held else None
        adopted.slots = torch.arange(adopted.seen - held, adopted.seen, device=device) if held else None
        adopted.valid = torch.ones(len(layer.keys), held, dtype=torch.bool, device=device) if held else None
    return adopted


def _rows(tensor: Tensor, rows: Tensor, moved: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of a tensor, taken once for all who share it."""
    key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # layers share a state by views of their own
    if key not in moved:
        moved[key] = (tensor, tensor[rows])  # the old one is kept so that its place stays its own
    return moved[key][1]


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
