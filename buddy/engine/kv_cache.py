"""The cache of a routed model: an ordinary transformers cache with room to grow and states that wait.

A cache is adopted at its first use: its class is swapped for a subclass and its layers for those of `cachelayers`, so
generation's beams, crops and copies go through it as ever.

The running mean of a context layer's cached states: what routers know of the prefix.

What one layer of a routed cache holds: everything, the last window, or only what some row ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from buddy.errors import BuddyError


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


ROOM = 64  # positions by which a buffer grows
SHORT = 256  # positions up to which a copy a token is cheaper than keeping a buffer
Waiting = tuple[Tensor, Any]  # a hidden state (B, T, D) and its position embeddings, owed keys and values


class DeferringLayer:
    """What both kinds of layer share: hidden states whose keys and values are owed (policy `fill`).

    Attributes:
        pending: in order of position; they follow the positions that the layer holds.
    """

    pending: list[Waiting]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what follows the positions held.

        Raises:
            RuntimeError: states still wait, as when a routed model's cache is given to the stock model after `detach`.
        """
        if self.pending:
            raise RuntimeError("Skipped states still wait in this cache; go on with the routed model that filled it.")
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def pending_length(self) -> int:
        """Positions that wait."""
        return sum(hidden.shape[1] for hidden, _ in self.pending)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.pending_length

    def reset(self) -> None:
        super().reset()
        self.pending = []

    # Stock asks for the length before it moves rows; here all of it may be owed, with nothing to move.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        remove = -tokens_to_remove
        while remove > 0 and self.pending:
            hidden, embeddings = self.pending.pop()
            keep = max(hidden.shape[1] - remove, 0)
            remove -= hidden.shape[1] - keep
            if keep:
                self.pending.append((hidden[:, :keep], each(embeddings, lambda x: x[:, :keep])))  # noqa: B023
        super().crop(-remove if tokens_to_remove <= 0 else tokens_to_remove)


class GrowingLayer(DeferringLayer, DynamicLayer):
    """Full attention. Long caches are views of buffers that grow by `ROOM` positions; stock copies them for each."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        length = held + key_states.shape[-2]
        if held < SHORT or self.pending:
            return super().update(key_states, value_states)
        if self.keys is not self.view or self.buffers[0].shape[2] < length:
            self.buffers = _grown(self.keys, held, length), _grown(self.values, held, length)
        keys, values = self.buffers
        keys[:, :, held:length] = key_states
        values[:, :, held:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.view = self.keys
        return self.keys, self.values


def growing(layer: DynamicLayer) -> DynamicLayer:
    """A stock full-attention layer as one that grows by buffers; any other as it is. What it holds stays."""
    if type(layer) is not DynamicLayer:
        return layer
    grown = GrowingLayer.__new__(GrowingLayer)
    grown.__dict__.update(layer.__dict__, pending=[], view=None)
    return grown


def _grown(held: Tensor, length: int, needed: int) -> Tensor:
    buffer = held.new_empty(*held.shape[:2], -(-needed // ROOM) * ROOM, held.shape[3])
    buffer[:, :, :length] = held
    return buffer


class SlidingLayer(DeferringLayer, DynamicSlidingWindowLayer):
    """Sliding-window attention: holds the last window, as stock does, and never lets a state wait."""


class HoleLayer(DeferringLayer, DynamicLayer):
    """Policy `hole`: holds only the positions that some row ran, full or sliding attention alike.

    Attributes:
        seen: positions that went by, stored or not.
        slots: (S,) long, the positions that are stored, rising.
        valid: (B, S) bool, which rows ran them.
        window: positions that a sliding layer can still see; None for all.
        unbroken: whether all of `seen` is stored for all rows.
    """

    unbroken: bool
    seen: int
    slots: Tensor | None
    valid: Tensor | None
    window: int | None

    @property
    def whole(self) -> bool:
        """Whether every position so far is stored for every row, so that the stock mask fits."""
        return self.unbroken and (self.slots is not None or self.seen == 0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All positions of all rows, as stock stores them; only where `whole` holds."""
        slots = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        past = None if self.slots is None else (self.keys, self.values)
        valid = torch.ones(len(key_states), len(slots), dtype=torch.bool, device=key_states.device)
        self.append(key_states, value_states, slots, valid, len(slots))
        if past is None:
            return key_states, value_states
        return torch.cat([past[0], key_states], -2), torch.cat([past[1], value_states], -2)

    def append(self, keys: Tensor, values: Tensor, slots: Tensor, valid: Tensor, length: int) -> None:
        """Store K and V (B, heads, U, size) of `slots` (U,) for the rows in `valid` (B, U); `length` positions pass."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        held = self.slots is not None
        self.keys = torch.cat([self.keys, keys], -2) if held else keys
        self.values = torch.cat([self.values, values], -2) if held else values
        self.slots = torch.cat([self.slots, slots]) if held else slots
        self.valid = torch.cat([self.valid, valid], 1) if held else valid
        unbroken = self.whole and slots.numel() == length and bool(valid.all())
        self.pass_by(length)
        self.unbroken = unbroken

    def pass_by(self, length: int) -> None:
        """`length` positions go by unstored; what leaves the window is let go."""
        self.seen, self.unbroken = self.seen + length, False
        if self.window is not None and self.slots is not None:
            self._keep(self.slots > self.seen - self.window)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.seen if self.window is None else min(self.seen, self.window - 1)
        return held + query_length, self.seen - held

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("Give the number of tokens to remove as a negative number.")
        if self.window is not None and self.seen >= self.window and tokens_to_remove:
            raise RuntimeError("The sliding window was reached, so what left it cannot be brought back by `crop`.")
        self.seen += tokens_to_remove
        if self.slots is not None:
            self._keep(self.slots < self.seen)

    def reset(self) -> None:
        super().reset()
        self.seen, self.slots, self.valid, self.unbroken = 0, None, None, True

    def select_rows(self, rows: Tensor) -> None:
        """Rows of K, V and their validity."""
        if self.slots is not None:
            self.keys, self.values, self.valid = self.keys[rows], self.values[rows], self.valid[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.slots is not None:
            self.select_rows(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def _keep(self, which: Tensor) -> None:
        if not bool(which.all()):
            self.keys, self.values = self.keys[:, :, which], self.values[:, :, which]
            self.slots, self.valid = self.slots[which], self.valid[:, which]


def each(embeddings: Any, function: Any) -> Any:
    """`function` of every part of position embeddings."""
    return tuple(function(part) for part in embeddings) if isinstance(embeddings, tuple) else embeddings


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
            layer.pending = [
                (_rows(h, rows, moved), each(e, lambda x: _rows(x, rows, moved) if x.shape[0] > 1 else x))
                for h, e in layer.pending
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


def _adopted_layer(layer: Any, policy: str) -> DeferringLayer:
    kind: Any = HoleLayer if policy == "hole" else _LAYERS[type(layer)]
    adopted = kind.__new__(kind)
    adopted.__dict__.update(layer.__dict__, pending=[], view=None)
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
