"""What a layer's KV cache holds for the tokens that skipped it.

`Fill` computes their keys and values from the hidden state that passed the layer, `Zero` stores zeros as the paper
does, `Hole` stores nothing. Each policy has the same methods: `skip`, where no token of a forward runs the layer;
`writer`, where some tokens do; and `flush`, before all do. Their `forward` is the `RoutedForward` that is running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from buddy.engine.kv_cache import Embeddings
from buddy.engine.selection import Group, map_tensors, take
from buddy.engine.transfer import to_device

MAX_PENDING = 64  # states that may be pending in a layer: a prompt's is one, then one for each token
KV = tuple[Tensor, Tensor]
WriteKV = Callable[[nn.Module, Tensor, Embeddings], KV]  # layer, hidden (B, T, D), position embeddings


class Fill:
    """K/V of a skipped layer are computed from the hidden state that passed it, as late as possible."""

    name: ClassVar = "fill"

    def skip(self, layer: nn.Module, forward: Any, hidden: Tensor, cache: Any, embeddings: Embeddings) -> None:
        """No token runs the layer: the states are pending until one does, or until too many are.

        The states of a prompt are deferred where that takes no more memory than their keys and values.
        """
        stored = cache.layers[layer._index]
        pending = stored.pending
        pending.append((hidden, embeddings))
        full = len(pending) >= MAX_PENDING or stored.is_sliding  # a window drops positions, so none may be late
        if not full and forward.shape[1] == 1:  # the hot path: a step of decoding, for each layer that it skips
            return
        chunk = len(pending) > 1 and hidden.shape[1] > 1  # only a whole prompt is deferred
        if full or chunk or not forward.can_defer(layer._index):
            self.flush(layer, cache)

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Compute K/V of all pending positions, in one product."""
        stored = cache.layers[layer._index]
        if not stored.pending:
            return
        pending, stored.pending = stored.pending, []
        states, embeddings = zip(*pending, strict=True)
        hidden = torch.cat(states, 1) if len(states) > 1 else states[0]
        stored.update(*layer._write_kv(layer, hidden, _joined(embeddings, hidden.shape[0])))

    def writer(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> RectangularKVWriter:
        """Some tokens run the layer."""
        if kwargs.get("cache") is not None:
            self.flush(layer, kwargs["cache"])
        return RectangularKVWriter(layer, forward, hidden, kwargs, layer._write_kv)


class Zero:
    """Zeros in the cache, unmasked, so that they take their share of the softmax: the paper's way (2606.09514)."""

    name: ClassVar = "zero"

    def skip(self, layer: nn.Module, forward: Any, hidden: Tensor, cache: Any, embeddings: Embeddings) -> None:
        """No token runs the layer."""
        cache.update(*self._zeros(layer, hidden, embeddings), layer._index)

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Nothing is ever pending."""

    def writer(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> RectangularKVWriter:
        """Some tokens run the layer."""
        return RectangularKVWriter(layer, forward, hidden, kwargs, self._zeros)

    @staticmethod
    def _zeros(layer: nn.Module, hidden: Tensor, _: Embeddings) -> KV:
        heads, size = layer.self_attn.config.num_key_value_heads, layer.self_attn.head_dim
        zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], size)
        return zeros, zeros


class Hole:
    """A token is absent from the cache of a layer that it skipped, and masked where other rows ran the layer."""

    name: ClassVar = "hole"

    def skip(self, layer: nn.Module, forward: Any, hidden: Tensor, cache: Any, embeddings: Embeddings) -> None:
        """No token runs the layer: their positions pass."""
        cache.layers[layer._index].skip(hidden.shape[1])

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Nothing is ever pending."""

    def writer(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> RaggedKVWriter:
        """Some tokens run the layer."""
        return RaggedKVWriter(layer, forward, hidden, kwargs)


Policy = Fill | Hole | Zero
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Fill(), Hole(), Zero())}


class RectangularKVWriter:
    """Stands in for the cache in a layer's calls of one forward: K/V of all positions of all rows (`fill` and `zero`).

    Args:
        layer: a routed layer.
        forward: the forward pass.
        hidden: (B, T, D) as it enters the layer.
        kwargs: of the layer's forward.
        write: makes K and V of hidden states that skip the layer.

    Attributes:
        group: of the call that is next or running.
    """

    group: Group

    def __init__(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict, write: WriteKV) -> None:
        (self.batch, self.length), self.layer, self.hidden, self.write = forward.shape, layer, hidden, write
        self.cache, self.embeddings = kwargs.get("cache"), kwargs.get("position_embeddings")
        self.new: KV | None = None
        self.missing = set(range(len(hidden)))  # rows that no call has written yet

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """Take what the call wrote; give all K/V that it may read: the past, and all new positions of its rows."""
        group, rows = self.group, self.group.rows
        if group.rest is not None:
            own, skipped = torch.arange(len(rows), device=rows.device), self._write(rows, group.rest)
            places = (own[:, None] * self.length + group.rest).flatten(), group.flat(self.length, own)
            keys, values = (self._merged(x, y, *places) for x, y in zip(skipped, (keys, values), strict=True))
        if self.cache is None:
            return keys, values
        self._collect((keys, values))
        stored = self.cache.layers[self.layer._index]
        if not stored.is_initialized or stored.keys.dim() != 4 or not stored.keys.shape[2]:
            return keys, values
        past = (stored.keys, stored.values) if len(rows) == self.batch else (stored.keys[rows], stored.values[rows])
        return torch.cat([past[0], keys], -2), torch.cat([past[1], values], -2)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask (G, 1, n, S) of the call's queries, from the layer's own (B or 1, 1, T, S)."""
        rows, positions = self.group.rows, self.group.positions
        if mask is None:
            # Stock code leaves the mask out where it is plainly causal; a selection of queries needs it explicitly.
            if positions is None or self.length == 1:
                return None
            return (torch.arange(self.length, device=rows.device) <= positions[..., None])[:, None]
        if positions is None:
            return mask[rows] if mask.shape[0] == self.batch > 1 else mask
        return take(mask[:, 0], rows, positions, self.batch)[:, None]

    def finish(self) -> None:
        """After the last call: hand everything to the cache."""
        if self.cache is None:
            return
        if self.missing:
            rows = to_device(sorted(self.missing), self.hidden.device)
            for whole, part in zip(self.new, self._write(rows, None), strict=True):
                whole[rows] = part
        self.cache.update(*self.new, self.layer._index)

    def _collect(self, new: KV) -> None:
        """Keep K and V of the group's rows."""
        if len(self.group.rows) == self.batch:
            self.new, self.missing = new, set()
            return
        self.missing -= set(self.group.rows_on_host)
        if self.new is None:
            keys, values = (part.new_empty(self.batch, *part.shape[1:]) for part in new)
            self.new = (keys, values)
        for whole, part in zip(self.new, new, strict=True):
            whole[self.group.rows] = part

    def _write(self, rows: Tensor, positions: Tensor | None) -> KV:
        def chosen(value: Any) -> Any:
            return map_tensors(value, lambda part: take(part, rows, positions, self.batch))

        return self.write(self.layer, chosen(self.hidden), chosen(self.embeddings))

    def _merged(self, skipped: Tensor, ran: Tensor, *places: Tensor) -> Tensor:
        """(G, heads, T, size): states of positions that skip the layer and, over them, of those that ran."""
        groups, heads, _, size = skipped.shape
        whole = skipped.new_empty(groups, self.length, heads, size)
        for part, place, real in zip((skipped, ran), places, (slice(None), self.group.real), strict=True):
            flat = part.transpose(1, 2).reshape(-1, heads * size)[real]
            # Under autocast, K and V of a type of its own meet zeros of the weights' type.
            whole.view(-1, heads * size).index_copy_(0, place, flat.to(whole.dtype))
        return whole.transpose(1, 2)


class RaggedKVWriter:
    """Stands in for the cache in a layer's calls of one forward: K/V of the positions that any row ran (`hole`).

    Attributes:
        group: of the call that is next or running.
    """

    group: Group

    def __init__(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> None:
        self.forward, cache = forward, kwargs.get("cache")
        self.stored = None if cache is None else cache.layers[layer._index]
        chosen = forward.chosen(layer._index)
        if forward.valid is not None:
            chosen = chosen & forward.valid
        # Some row runs the one position of a step; to look for it would be to wait for the device.
        step = chosen.shape[1] == 1
        self.union = torch.zeros(1, dtype=torch.long, device=hidden.device) if step else chosen.any(0).nonzero()[:, 0]
        self.valid = chosen[:, self.union]
        # (T,): where each position is stored among the new ones; the last index collects those that are not stored.
        self.slot_of = torch.full((chosen.shape[1],), len(self.union), device=hidden.device)
        self.slot_of[self.union] = torch.arange(len(self.union), device=hidden.device)
        self.new: list[Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """Take what the call wrote; give the past and the new stored positions of the group's rows, run or not."""
        rows, batch, stored = self.group.rows, self.forward.shape[0], len(self.union) + 1
        if self.new is None:
            self.new = [part.new_zeros(batch, part.shape[1], stored, part.shape[3]) for part in (keys, values)]
        slots = self.slot_of[self._positions]
        for whole, part in zip(self.new, (keys, values), strict=True):
            whole[rows[:, None], :, slots] = part.transpose(1, 2)
        here: Any = slice(None) if len(rows) == batch else rows  # a slice spares a copy of the cache
        keys, values = (part[here][:, :, :-1] for part in self.new)
        past = self._past
        if past is None:
            return keys, values
        return torch.cat([past.keys[here], keys], -2), torch.cat([past.values[here], values], -2)

    def mask(self, mask: Tensor | None) -> Tensor:
        """(G, 1, n, S) over the stored positions: causal, within the layer's window, and run by the row."""
        forward, rows, positions, past = self.forward, self.group.rows, self._positions, self._past
        slots, valid = self.union + forward.past, self.valid[rows]
        if past is not None:
            slots, valid = torch.cat([past.slots, slots]), torch.cat([past.valid[rows], valid], 1)
        if mask is None:
            return (slots <= (positions + forward.past)[..., None])[:, None] & valid[:, None, None]
        offset = forward.past + forward.shape[1] - mask.shape[-1]  # a sliding layer's mask starts later
        seen = take(mask[:, 0], rows, positions, forward.shape[0])[:, None][..., slots - offset]
        if mask.dtype == torch.bool:
            return seen & valid[:, None, None]
        return seen.masked_fill(~valid[:, None, None], torch.finfo(seen.dtype).min)

    def finish(self) -> None:
        """After the last call: hand everything to the cache."""
        if self.stored is not None and self.new is not None:
            keys, values = (part[:, :, :-1] for part in self.new)
            self.stored.append(keys, values, self.union + self.forward.past, self.valid, self.forward.shape[1])

    @property
    def _positions(self) -> Tensor:
        """(G, n) long, of the call."""
        rows, positions = self.group.rows, self.group.positions
        everywhere = torch.arange(self.forward.shape[1], device=rows.device)
        return everywhere.expand(len(rows), -1) if positions is None else positions

    @property
    def _past(self) -> Any | None:
        """The layer's cache where it holds something."""
        return None if self.stored is None or self.stored.slots is None else self.stored


def _joined(embeddings: Sequence[Embeddings], batch: int) -> Embeddings:
    """Position embeddings of consecutive forwards as one; those that hold for all rows are expanded where needed."""
    if len(embeddings) == 1 or not isinstance(embeddings[0], tuple):
        return embeddings[0]
    rows = 1 if batch == 1 else max(part.shape[0] for part, *_ in embeddings)
    joined = []
    for parts in zip(*embeddings, strict=True):
        joined.append(torch.cat([part.expand(rows, -1, -1) for part in parts] if rows > 1 else parts, 1))
    return tuple(joined)
