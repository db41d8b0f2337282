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
    """Collects the K/V that one layer writes in one forward, for all positions of all rows (`fill` and `zero`).

    Args:
        layer: a routed layer.
        forward: the forward pass.
        hidden: (B, T, D) as it enters the layer.
        kwargs: of the layer's forward.
        write: makes K and V of hidden states that skip the layer.
    """

    def __init__(self, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict, write: WriteKV) -> None:
        self.layer, self.forward, self.hidden, self.write = layer, forward, hidden, write
        self.cache, self.embeddings = kwargs.get("cache"), kwargs.get("position_embeddings")
        self.new: KV | None = None
        self.missing = set(range(len(hidden)))  # rows that no call has written yet

    def view(self, group: Group) -> RectangularView:
        """The cache as the layer sees it in the call for `group`."""
        rest = None if group.rest is None else self._write(group.rows, group.rest)
        return RectangularView(self, group, rest, self._past(group.rows))

    def collect(self, group: Group, new: KV) -> None:
        """Keep what the call for some rows wrote, if there is a cache."""
        if self.cache is None:
            return
        if len(group.rows_on_host) == len(self.hidden):
            self.new, self.missing = new, set()
            return
        self.missing -= set(group.rows_on_host)
        if self.new is None:
            keys, values = (part.new_empty(len(self.hidden), *part.shape[1:]) for part in new)
            self.new = (keys, values)
        for whole, part in zip(self.new, new, strict=True):
            whole[group.rows] = part

    def finish(self) -> None:
        """After the last call: hand everything to the cache."""
        if self.cache is None:
            return
        if self.missing:
            rows = to_device(sorted(self.missing), self.hidden.device)
            for whole, part in zip(self.new, self._write(rows, None), strict=True):
                whole[rows] = part
        self.cache.update(*self.new, self.layer._index)

    def _write(self, rows: Tensor, positions: Tensor | None) -> KV:
        def chosen(value: Any) -> Any:
            return map_tensors(value, lambda part: take(part, rows, positions, len(self.hidden)))

        return self.write(self.layer, chosen(self.hidden), chosen(self.embeddings))

    def _past(self, rows: Tensor) -> KV | None:
        if self.cache is None or not self.cache.layers[self.layer._index].is_initialized:
            return None
        stored = self.cache.layers[self.layer._index]
        if stored.keys.dim() != 4 or not stored.keys.shape[2]:
            return None
        all_rows = len(rows) == len(self.hidden)
        return (stored.keys, stored.values) if all_rows else (stored.keys[rows], stored.values[rows])


class RectangularView:
    """Stands in for the cache in the call for one group of rows: K/V of all their positions, skipped ones included.

    Args:
        writer: gets what the call writes.
        group: of the call.
        rest: K and V of the group's positions that skip the layer.
        past: K and V that the cache holds for the group's rows.
    """

    def __init__(self, writer: RectangularKVWriter, group: Group, rest: KV | None, past: KV | None) -> None:
        (self.batch, self.length), self.writer, self.group, self.past = writer.forward.shape, writer, group, past
        self._rows = torch.arange(len(group.rows), device=group.rows.device)
        self._placed: list[Tensor | None] = [None, None]
        if rest is not None:
            flat = (self._rows[:, None] * self.length + group.rest).flatten()
            self._placed = [self._place(None, part, flat, slice(None)) for part in rest]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """Take what the call wrote; give all K/V that it may read: the past, and all new positions of its rows."""
        if self.group.positions is not None:
            flat, real = self.group.flat(self.length, self._rows), self.group.real
            placed = [self._place(to, part, flat, real) for to, part in zip(self._placed, (keys, values), strict=True)]
            keys, values = (part.transpose(1, 2) for part in placed)
        self.writer.collect(self.group, (keys, values))
        if self.past is None:
            return keys, values
        return torch.cat([self.past[0], keys], -2), torch.cat([self.past[1], values], -2)

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

    def _place(self, to: Tensor | None, part: Tensor, flat: Tensor, real: Tensor | slice) -> Tensor:
        """Write `part` (G, heads, n, size) at indices `flat` of `to` (G, T, heads, size), which it makes if None."""
        groups, heads, _, size = part.shape
        if to is None:
            to = part.new_empty(groups, self.length, heads, size)
        part = part.transpose(1, 2).reshape(-1, heads * size)
        to.view(-1, heads * size).index_copy_(0, flat, part[real].to(to.dtype))  # autocast makes others than zeros have
        return to


class RaggedKVWriter:
    """Collects the K/V of one layer in one forward for the positions that any row ran, marked by row (`hole`)."""

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

    def view(self, group: Group) -> RaggedView:
        """The cache as the layer sees it in the call for `group`."""
        return RaggedView(self, group)

    def finish(self) -> None:
        """After the last call: hand everything to the cache."""
        if self.stored is not None and self.new is not None:
            keys, values = (part[:, :, :-1] for part in self.new)
            self.stored.append(keys, values, self.union + self.forward.past, self.valid, self.forward.shape[1])

    def past(self) -> Any | None:
        """The layer's cache where it holds something."""
        return None if self.stored is None or self.stored.slots is None else self.stored


class RaggedView:
    """Stands in for the cache in the call for one group of rows: K/V of the stored positions."""

    def __init__(self, writer: RaggedKVWriter, group: Group) -> None:
        self.writer, self.group = writer, group
        length = writer.forward.shape[1]
        everywhere = torch.arange(length, device=group.rows.device).expand(len(group.rows), -1)
        self._positions = everywhere if group.positions is None else group.positions

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """Take what the call wrote; give the past and the new stored positions of the group's rows, run or not."""
        writer, rows = self.writer, self.group.rows
        batch, stored = writer.forward.shape[0], len(writer.union) + 1
        if writer.new is None:
            writer.new = [part.new_zeros(batch, part.shape[1], stored, part.shape[3]) for part in (keys, values)]
        slots = writer.slot_of[self._positions]
        for whole, part in zip(writer.new, (keys, values), strict=True):
            whole[rows[:, None], :, slots] = part.transpose(1, 2)
        here: Any = slice(None) if len(rows) == batch else rows  # a slice spares a copy of the cache
        keys, values = (part[here][:, :, :-1] for part in writer.new)
        past = writer.past()
        if past is None:
            return keys, values
        return torch.cat([past.keys[here], keys], -2), torch.cat([past.values[here], values], -2)

    def mask(self, mask: Tensor | None) -> Tensor:
        """(G, 1, n, S) over the stored positions: causal, within the layer's window, and run by the row."""
        writer, forward, rows = self.writer, self.writer.forward, self.group.rows
        past = writer.past()
        slots, valid = writer.union + forward.past, writer.valid[rows]
        if past is not None:
            slots, valid = torch.cat([past.slots, slots]), torch.cat([past.valid[rows], valid], 1)
        if mask is None:
            return (slots <= (self._positions + forward.past)[..., None])[:, None] & valid[:, None, None]
        offset = forward.past + forward.shape[1] - mask.shape[-1]  # a sliding layer's mask starts later
        seen = take(mask[:, 0], rows, self._positions, forward.shape[0])[:, None][..., slots - offset]
        if mask.dtype == torch.bool:
            return seen & valid[:, None, None]
        return seen.masked_fill(~valid[:, None, None], torch.finfo(seen.dtype).min)


def _joined(embeddings: Sequence[Embeddings], batch: int) -> Embeddings:
    """Position embeddings of consecutive forwards as one; those that hold for all rows are expanded where needed."""
    if len(embeddings) == 1 or not isinstance(embeddings[0], tuple):
        return embeddings[0]
    rows = 1 if batch == 1 else max(part.shape[0] for part, *_ in embeddings)
    joined = []
    for parts in zip(*embeddings, strict=True):
        joined.append(torch.cat([part.expand(rows, -1, -1) for part in parts] if rows > 1 else parts, 1))
    return tuple(joined)
