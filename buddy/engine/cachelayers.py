"""What one layer of a routed cache holds: everything, the last window, or only what some row ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # positions by which a buffer grows
SHORT = 256  # positions up to which a copy a token is cheaper than keeping a buffer
Waiting = tuple[Tensor, Any]  # a hidden state (B, T, D) and its position embeddings, owed keys and values


class OwingLayer:
    """What both kinds of layer share: hidden states whose keys and values are owed (policy `fill`).

    Attributes:
        owed: in order of position; they follow the positions that the layer holds.
    """

    owed: list[Waiting]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what follows the positions held.

        Raises:
            RuntimeError: states still wait, as when a routed model's cache is given to the stock model after `detach`.
        """
        if self.owed:
            raise RuntimeError("Skipped states still wait in this cache; go on with the routed model that filled it.")
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def owed_length(self) -> int:
        """Positions that wait."""
        return sum(hidden.shape[1] for hidden, _ in self.owed)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.owed_length

    def reset(self) -> None:
        super().reset()
        self.owed = []

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
        while remove > 0 and self.owed:
            hidden, embeddings = self.owed.pop()
            keep = max(hidden.shape[1] - remove, 0)
            remove -= hidden.shape[1] - keep
            if keep:
                self.owed.append((hidden[:, :keep], each(embeddings, lambda x: x[:, :keep])))  # noqa: B023
        super().crop(-remove if tokens_to_remove <= 0 else tokens_to_remove)


class GrowingLayer(OwingLayer, DynamicLayer):
    """Full attention. Long caches are views of buffers that grow by `ROOM` positions; stock copies them for each."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        length = held + key_states.shape[-2]
        if held < SHORT or self.owed:
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
    grown.__dict__.update(layer.__dict__, owed=[], view=None)
    return grown


def _grown(held: Tensor, length: int, needed: int) -> Tensor:
    buffer = held.new_empty(*held.shape[:2], -(-needed // ROOM) * ROOM, held.shape[3])
    buffer[:, :, :length] = held
    return buffer


class SlidingLayer(OwingLayer, DynamicSlidingWindowLayer):
    """Sliding-window attention: holds the last window, as stock does, and never lets a state wait."""


class HoleLayer(OwingLayer, DynamicLayer):
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
