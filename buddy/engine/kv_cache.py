"""The KV cache of a routed model: a transformers DynamicCache whose layers can store late, grow, or have holes.

A cache is adopted at its first use, while it is empty: its class and those of its layers are swapped for subclasses, so
generation's beams and copies go through it as ever. It carries what routing needs between forwards: the pooled context
and the scores of the last decision.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from buddy.engine.selection import map_tensors
from buddy.errors import BuddyError

ROOM = 64  # positions by which a buffer grows
SHORT = 256  # positions up to which a copy for each token is cheaper than keeping a buffer
Embeddings = Any  # position embeddings: a tuple of (B or 1, T, size) tensors, or None
Pending = tuple[Tensor, Embeddings]  # a hidden state (B, T, D) whose keys and values are not computed yet


def context_features(keys: Tensor, values: Tensor, kind: str) -> Tensor:
    """Cached states (B, heads, T, size) as (B, T, F) float32: F = heads × size, twice that for "both"."""
    chosen = {"value": (values,), "key": (keys,), "both": (keys, values)}[kind]
    flat = [states.transpose(1, 2).flatten(2) for states in chosen]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, -1)).float()


class ContextPool:
    """Running mean, per row, of the context layer's cached states: what routers know of the prefix.

    Attributes:
        kind: which states are pooled: "value", "key" or "both".
        total: (B, F) float32, the sum over all valid positions so far; None before the first token.
        count: positions in the sum: one number while no row was ever padded, else (B, 1) float32.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.total: Tensor | None = None
        self.count: float | Tensor = 0.0

    def add(self, states: Tensor, valid: Tensor | None) -> Tensor:
        """Means over each prefix, (B, T, F) float32, of states (B, T, F); positions not in `valid` (B, T) are left out.

        A step of decoding, with T = 1, takes two small sums.
        """
        batch, length, _ = states.shape
        padded = isinstance(self.count, Tensor)
        if valid is None and not padded:
            if length == 1:
                self.total = states[:, 0] if self.total is None else self.total + states[:, 0]
                self.count += 1
                return (self.total / self.count)[:, None]
            totals = self._add_total(states.cumsum(1))
            counts = torch.arange(1, length + 1, device=states.device) + self.count
            self.total, self.count = totals[:, -1], self.count + length
            return totals / counts[:, None]
        if not padded:
            self.count = torch.full((batch, 1), float(self.count), device=states.device)
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=states.device)
        totals = self._add_total((states * valid[..., None]).cumsum(1))
        counts = valid.to(states.dtype).cumsum(1) + self.count
        self.total, self.count = totals[:, -1], counts[:, -1:]
        return totals / counts.clamp(min=1)[..., None]

    def select_rows(self, rows: Tensor) -> None:
        """Keep or repeat rows, as beams do."""
        if self.total is None:
            return
        self.total = self.total[rows]
        if isinstance(self.count, Tensor):
            self.count = self.count[rows]

    def crop(self, removed: int, keys: Tensor, values: Tensor) -> None:
        """Take back the last `removed` positions, given their keys and values (B, heads, removed, size).

        None of them is padding, which is on the left.
        """
        gone = context_features(keys, values, self.kind)
        self.total, self.count = self.total - gone.sum(1), self.count - removed

    def _add_total(self, totals: Tensor) -> Tensor:
        return totals if self.total is None else totals + self.total[:, None]


class PendingLayer:
    """Mixed into a cache layer that may hold hidden states whose keys and values are not computed yet.

    Attributes:
        pending: in order of position; they follow the positions that the layer stores.
    """

    pending: list[Pending]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what follows the positions stored so far.

        Raises:
            RuntimeError: states are pending, as when a routed model's cache is given to the stock model after `detach`.
        """
        if self.pending:
            raise RuntimeError("Skipped states are pending in this cache; use the routed model that filled it.")
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + sum(hidden.shape[1] for hidden, _ in self.pending)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:  # else all positions are pending; the stock method would ask only for their number
            super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        remove = -tokens_to_remove
        while remove > 0 and self.pending:
            hidden, embeddings = self.pending.pop()
            keep = max(hidden.shape[1] - remove, 0)
            remove -= hidden.shape[1] - keep
            if keep:
                self.pending.append((hidden[:, :keep], map_tensors(embeddings, lambda x: x[:, :keep])))  # noqa: B023
        super().crop(-remove if tokens_to_remove <= 0 else tokens_to_remove)


class GrowingLayer(PendingLayer, DynamicLayer):
    """Full attention. A long cache is a view of a buffer that grows by `ROOM` positions; stock copies it at each token.

    Attributes:
        view: the keys as `update` left them; if `keys` is another tensor, rows were moved or cropped.
    """

    view: Tensor | None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        length = stored + key_states.shape[-2]
        if stored < SHORT or self.pending:
            return super().update(key_states, value_states)
        writable = torch.is_inference_mode_enabled() or (self.view is not None and not self.view.is_inference())
        if self.keys is not self.view or self.buffers[0].shape[2] < length or not writable:
            self.buffers = _grown(self.keys, length), _grown(self.values, length)
        keys, values = self.buffers
        keys[:, :, stored:length] = key_states
        values[:, :, stored:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.view = self.keys
        return self.keys, self.values


def growing_layer(layer: DynamicLayer) -> DynamicLayer:
    """A stock full-attention cache layer as one that grows by buffers; any other as it is. What it stores stays."""
    return _swapped(layer, GrowingLayer) if type(layer) is DynamicLayer else layer


def _swapped(layer: DynamicLayer, cls: Any) -> Any:
    swapped = cls.__new__(cls)
    swapped.__dict__.update(layer.__dict__, pending=[], view=None)
    return swapped


def _grown(stored: Tensor, needed: int) -> Tensor:
    buffer = stored.new_empty(*stored.shape[:2], -(-needed // ROOM) * ROOM, stored.shape[3])
    buffer[:, :, : stored.shape[2]] = stored
    return buffer


class SlidingLayer(PendingLayer, DynamicSlidingWindowLayer):
    """Sliding-window attention: stores the last window, as stock does; its states never wait."""


class HoleLayer(PendingLayer, DynamicLayer):
    """Policy `hole`: stores only the positions that some row ran, with full and with sliding attention.

    Attributes:
        seen: positions that passed, stored or not.
        slots: (S,) long, the positions that are stored, rising.
        valid: (B, S) bool, which rows ran them.
        window: positions that a sliding layer can still see; None for all.
        complete: whether every position that passed is stored for every row, so that the stock mask fits.
    """

    seen: int = 0
    slots: Tensor | None = None
    valid: Tensor | None = None
    window: int | None = None
    complete: bool = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All positions of all rows, as stock stores them; only where `complete` holds."""
        slots = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        past = None if self.slots is None else (self.keys, self.values)
        complete = self.complete
        valid = torch.ones(len(key_states), len(slots), dtype=torch.bool, device=key_states.device)
        self.append(key_states, value_states, slots, valid, len(slots))
        self.complete = complete  # as before: these positions are all stored
        if past is None:
            return key_states, value_states
        return torch.cat([past[0], key_states], -2), torch.cat([past[1], value_states], -2)

    def append(self, keys: Tensor, values: Tensor, slots: Tensor, valid: Tensor, length: int) -> None:
        """Store K and V (B, heads, U, size) of positions `slots` (U,), for the rows in `valid` (B, U).

        Args:
            length: positions that pass in this forward, stored or not.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        more = self.slots is not None
        self.keys = torch.cat([self.keys, keys], -2) if more else keys
        self.values = torch.cat([self.values, values], -2) if more else values
        self.slots = torch.cat([self.slots, slots]) if more else slots
        self.valid = torch.cat([self.valid, valid], 1) if more else valid
        self.skip(length)

    def skip(self, length: int) -> None:
        """`length` positions pass without being stored; what leaves the window is dropped."""
        self.seen, self.complete = self.seen + length, False
        if self.window is not None and self.slots is not None:
            self.keep(self.slots > self.seen - self.window)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.seen if self.window is None else min(self.seen, self.window - 1)
        return stored + query_length, self.seen - stored

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("Give the number of tokens to remove as a negative number.")
        if self.window is not None and self.seen >= self.window and tokens_to_remove:
            raise RuntimeError(
                "The sliding window was reached, and what left it is gone; choose the policy fill or zero for assisted "
                "generation."
            )
        self.seen += tokens_to_remove
        if self.slots is not None:
            self.keep(self.slots < self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.slots is not None:
            self.keys, self.values, self.valid = self.keys[beam_idx], self.values[beam_idx], self.valid[beam_idx]

    def keep(self, which: Tensor) -> None:
        """Keep some of the stored positions, `which` (S,) bool."""
        if not bool(which.all()):
            self.keys, self.values = self.keys[:, :, which], self.values[:, :, which]
            self.slots, self.valid = self.slots[which], self.valid[:, which]


class RoutedCache:
    """Mixed into the class of a cache that a routed model has adopted.

    Attributes:
        filled_by: what fills it: the backbone's fingerprint, the policy, the index of the context layer and the states
            that are pooled. Only the same may continue with it.
        pool: the context so far.
        scores: (B, S, R), what later tokens need: of the last decision, S = 1, for tokens that do not decide; or of the
            last tokens, which later ones compete with (`mean_over`). Else None.
        excess: (B,) long, layers that the row's tokens ran beyond its budget (`mean_over`); None before there are any.
        decided: position of the prompt's last token, from which decisions are counted; None before there is one.
        executed: K for each row, where a budget predictor chose it.
        shared: whether the first forward's last token planned for the others, or chose their budget.
        shortest: where rows are padded and whoever decodes knows it, the tokens of the row with the fewest.
    """

    filled_by: tuple[str, str, int, str]
    pool: ContextPool
    scores: Tensor | None = None
    excess: Tensor | None = None
    decided: int | None = None
    executed: tuple[int, ...] | None = None
    shared: bool = False
    shortest: int | None = None

    @property
    def is_compileable(self) -> bool:
        """Keeps transformers from reading, at a decode step, whether the mask hides anything."""
        return self.shortest is not None

    @property
    def is_croppable(self) -> bool:
        """Whether assisted generation may take drafts back: not where one of them may have planned for others."""
        return super().is_croppable and not self.shared and self.scores is None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, move or repeat rows, as beams do; the transformers methods below do no more than that."""
        super().reorder_cache(beam_idx)
        self.pool.select_rows(beam_idx)
        if self.scores is not None:
            self.scores = self.scores[beam_idx]
        if self.excess is not None:
            self.excess = self.excess[beam_idx]
        if self.executed is not None:
            self.executed = tuple(self.executed[row] for row in beam_idx.tolist())
        moved: dict[Any, Any] = {}  # one state is pending in every layer of a run, one embedding with many states

        def rows(x: Tensor) -> Tensor:
            return _rows(x, beam_idx, moved) if x.shape[0] > 1 else x

        for layer in self.layers:
            layer.pending = [(_rows(x, beam_idx, moved), map_tensors(e, rows)) for x, e in layer.pending]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pool.total is not None:
            rows = torch.arange(len(self.pool.total), device=self.pool.total.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        raise BuddyError("A routed cache is not emptied; start with a new one.")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions.

        Raises:
            BuddyError: the removed tokens may have decided for others, or displaced the scores of earlier ones.
        """
        if self.scores is not None and tokens_to_remove < 0:
            raise BuddyError(
                "Tokens cannot be taken back, as assisted generation does, where one plan or budget holds for several "
                "tokens; set reroute_every and mean_over to 1."
            )
        gone: list[Tensor] = []
        if tokens_to_remove < 0 and self.pool.total is not None:  # transformers itself refuses positive numbers
            context = self.layers[self.filled_by[2]]
            gone = [x[..., tokens_to_remove:, :] for x in (context.keys, context.values)]
        super().crop(tokens_to_remove)  # it may refuse
        if gone:
            self.pool.crop(-tokens_to_remove, *gone)


_LAYERS: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: SlidingLayer}


def adopt(cache: Any, settings: Any, model: str) -> int:
    """Make an empty `cache` fit for routing, in place, or check that an adopted one belongs to this model.

    Args:
        cache: a DynamicCache of this model.
        settings: the `Settings` of the routed model.
        model: the backbone's fingerprint.

    Returns:
        The number of positions that it holds.

    Raises:
        BuddyError: a cache of another kind, of another model, filled without routing or under another policy.
    """
    layers, policy, context = settings.layers, settings.policy, settings.context_layer - 1
    filled_by = model, policy, context, settings.pool
    if isinstance(cache, RoutedCache):
        if cache.filled_by != filled_by or len(cache.layers) != layers:
            raise BuddyError(
                "This cache was filled by another model or under other routing settings; start with an empty cache."
            )
        return cache.get_seq_length(context)
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
    if cache.get_seq_length(context):
        raise BuddyError(
            "This cache was filled by the stock model; start with an empty cache, or fill it under a budget."
        )
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = _swapped(layer, HoleLayer if policy == "hole" else _LAYERS[type(layer)])
        if policy == "hole":
            cache.layers[index].is_sliding = layer.is_sliding
            cache.layers[index].window = getattr(layer, "sliding_window", None)
    cache.__class__ = _routed_class(type(cache))  # type: ignore[arg-type]  # a class can be hashed
    cache.filled_by, cache.pool = filled_by, ContextPool(settings.pool)
    return 0


@functools.cache
def _routed_class(stock: type) -> type:
    return type(f"Routed{stock.__name__}", (RoutedCache, stock), {"__module__": __name__})


class WrittenKV:
    """Stands in for a layer's cache, if any, and keeps the newest keys and values, each (B, heads, T, size)."""

    def __init__(self, cache: Any | None) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer, *args, **kwargs)


def _rows(tensor: Tensor, rows: Tensor, moved: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of a tensor, selected once for all layers that share it."""
    key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # layers share a state by views of their own
    if key not in moved:
        moved[key] = (tensor, tensor[rows])  # the old tensor is kept, so that its memory is not used again meanwhile
    return moved[key][1]
