"""What a layer's cache holds for the tokens that skipped it.

`Fill` computes their K/V from the hidden state that passed the layer, `Zero` leaves zeros as the paper does, `Hole`
leaves nothing. Each has the same duties: `idle`, where no token of the forward runs the layer, `writer`, where some do,
and `flush`, before all do.

K/V of one layer in one forward, stored for all positions of all rows (policies `fill` and `zero`).

K/V of one layer in one forward, stored only for positions that some row ran (policy `hole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from buddy.engine.forward import RoutedForward
from buddy.engine.selection import Blocks, Group, blocks_of, take, taken
from buddy.errors import BuddyError

KV = tuple[Tensor, Tensor]


class View(Protocol):
    """The cache as a layer sees it in the call for one group of rows."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> KV:
        """Take what the call wrote, give all that it may read."""

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask of the call's queries for what `update` gives, from the layer's own (B or 1, 1, T, S)."""

    def blocks(self, mask: Tensor | None) -> Blocks | None:
        """How the attention of the call may be cut, given that mask."""


class RectangularKVWriter:
    """Puts together the K/V that one layer writes in one forward: all positions of all rows.

    Args:
        layer: a routed layer.
        current: the pass.
        hidden: (B, T, D) as it enters the layer.
        kwargs: of the layer's forward.
        write: makes K and V of (G, n, D) hidden states that skip the layer, with their position embeddings.
    """

    def __init__(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, kwargs: dict, write: Any) -> None:
        self.layer, self.current, self.hidden, self.write = layer, current, hidden, write
        self.cache, self.embeddings = kwargs.get("cache"), kwargs.get("position_embeddings")
        self.new: KV | None = None
        self.idle = set(range(len(hidden)))

    def view(self, group: Group) -> RectangularView:
        """What the layer sees in the calls for `group`."""
        rest = None if group.rest is None else self._write(group.rows, group.rest)
        return RectangularView(self.current, group, rest, self._past(group.rows))

    def put(self, view: RectangularView) -> None:
        """Keep what the calls for a group wrote, if a cache will want it."""
        rows = view.group.rows
        if self.cache is None:
            return
        if len(rows) == len(self.hidden):
            self.new, self.idle = view.new, set()
            return
        self.idle -= set(rows.tolist())
        if self.new is None:
            keys, values = (part.new_empty(len(self.hidden), *part.shape[1:]) for part in view.new)
            self.new = (keys, values)
        for whole, part in zip(self.new, view.new, strict=True):
            whole[rows] = part

    def finish(self) -> None:
        """After the last call: hand everything to the real cache."""
        if self.cache is None:
            return
        if self.idle:
            rows = torch.tensor(sorted(self.idle), device=self.hidden.device)
            for whole, part in zip(self.new, self._write(rows, None), strict=True):
                whole[rows] = part
        self.cache.update(*self.new, self.layer._index)

    def _write(self, rows: Tensor, positions: Tensor | None) -> KV:
        embeddings = taken(self.embeddings, rows, positions, len(self.hidden))
        return self.write(self.layer, take(self.hidden, rows, positions, len(self.hidden)), embeddings)

    def _past(self, rows: Tensor) -> KV | None:
        if self.cache is None or not self.cache.layers[self.layer._index].is_initialized:
            return None
        held = self.cache.layers[self.layer._index]
        if held.keys.dim() != 4 or not held.keys.shape[2]:
            return None
        everyone = len(rows) == len(self.hidden)
        return (held.keys, held.values) if everyone else (held.keys[rows], held.values[rows])


class RectangularView:
    """K/V of a group: those of positions that skip the layer at once, those of its queries as the call brings them.

    Attributes:
        new: K and V, each (G, heads, T, size), after the call.
    """

    def __init__(self, current: RoutedForward, group: Group, rest: KV | None, past: KV | None) -> None:
        self.current, self.group, self.past = current, group, past
        self.length = current.shape[1]
        self.new: KV | None = None
        self._rows = torch.arange(len(group.rows), device=group.rows.device)
        self._laid: list[Tensor | None] = [None, None]
        if rest is not None:
            flat = (self._rows[:, None] * self.length + group.rest).flatten()
            self._laid = [self._lay(None, part, flat, None) for part in rest]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """All K/V that the call may read: the past, and everyone's at the new positions."""
        if self.group.positions is None:
            self.new = (keys, values)
        else:
            where = self.group.flat(self.length, self._rows)
            laid = [self._lay(to, part, *where) for to, part in zip(self._laid, (keys, values), strict=True)]
            keys, values = (part.transpose(1, 2) for part in laid)
            self.new = (keys, values)
        if self.past is None:
            return self.new
        keys, values = (torch.cat(both, -2) for both in zip(self.past, self.new, strict=True))
        return keys, values

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """That of the queries."""
        return self.current.mask(mask, self.group, self.group.rows.device)

    def blocks(self, mask: Tensor | None) -> Blocks | None:
        """Keys lie in order of position, so early queries need only the early ones."""
        return None if self.group.positions is None else blocks_of(self.group.positions, mask, self.length)

    def _lay(self, to: Tensor | None, part: Tensor, flat: Tensor, real: Tensor | None) -> Tensor:
        """`part` (G, heads, n, size) at its places `flat` of `to` (G, T, heads, size)."""
        groups, heads, _, size = part.shape
        if to is None:
            to = part.new_empty(groups, self.length, heads, size)
        part = part.transpose(1, 2).reshape(-1, heads * size)
        to.view(-1, heads * size).index_copy_(0, flat, part if real is None else part[real])
        return to


class RaggedKVWriter:
    """Puts together the K/V of one layer under `hole`: the positions that any row ran, marked for those that did."""

    def __init__(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, kwargs: dict) -> None:
        self.layer, self.current, self.cache = layer, current, kwargs.get("cache")
        chosen = current.chosen(layer._index)
        if current.valid is not None:
            chosen = chosen & current.valid
        self.union = chosen.any(0).nonzero()[:, 0]
        self.valid = chosen[:, self.union]
        self.slot_of = torch.full((chosen.shape[1],), len(self.union), device=hidden.device)  # the last one is a bin
        self.slot_of[self.union] = torch.arange(len(self.union), device=hidden.device)
        self.new: list[Tensor] | None = None

    def view(self, group: Group) -> RaggedView:
        """What the layer sees in the calls for `group`."""
        return RaggedView(self, group)

    def put(self, view: RaggedView) -> None:
        """All is kept as it comes."""

    def finish(self) -> None:
        """After the last call: hand everything to the real cache."""
        if self.cache is not None and self.new is not None:
            keys, values = (part[:, :, :-1] for part in self.new)
            slots = self.union + self.current.past
            self.cache.layers[self.layer._index].append(keys, values, slots, self.valid, self.current.shape[1])

    def held(self) -> Any | None:
        """The layer's cache where it holds something."""
        if self.cache is None or self.cache.layers[self.layer._index].slots is None:
            return None
        return self.cache.layers[self.layer._index]


class RaggedView:
    """K/V of the stored positions for one group of rows."""

    def __init__(self, writer: RaggedKVWriter, group: Group) -> None:
        self.writer, self.group = writer, group

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        """The past and the new stored positions of the group's rows, whoever ran them."""
        writer, rows = self.writer, self.group.rows
        batch, stored = writer.current.shape[0], len(writer.union) + 1
        if writer.new is None:
            writer.new = [part.new_zeros(batch, part.shape[1], stored, part.shape[3]) for part in (keys, values)]
        slots = writer.slot_of[self._positions()]
        for whole, part in zip(writer.new, (keys, values), strict=True):
            whole[rows[:, None], :, slots] = part.transpose(1, 2)
        keys, values = (part[rows][:, :, :-1] for part in writer.new)
        held = writer.held()
        if held is None:
            return keys, values
        return torch.cat([held.keys[rows], keys], -2), torch.cat([held.values[rows], values], -2)

    def mask(self, mask: Tensor | None) -> Tensor:
        """(G, 1, n, S) of the stored positions: causal, of the layer's window, and run by the row."""
        writer, current, rows = self.writer, self.writer.current, self.group.rows
        held = writer.held()
        slots, valid = writer.union + current.past, writer.valid[rows]
        if held is not None:
            slots, valid = torch.cat([held.slots, slots]), torch.cat([held.valid[rows], valid], 1)
        queries = self._positions()
        if mask is None:
            return (slots <= (queries + current.past)[..., None])[:, None] & valid[:, None, None]
        offset = current.past + current.shape[1] - mask.shape[-1]  # a sliding layer's mask starts later
        seen = take(mask[:, 0], rows, queries, current.shape[0])[:, None][..., slots - offset]
        if mask.dtype == torch.bool:
            return seen & valid[:, None, None]
        return seen.masked_fill(~valid[:, None, None], torch.finfo(seen.dtype).min)

    def blocks(self, mask: Tensor | None) -> None:
        """Stored positions are few; one call is best."""

    def _positions(self) -> Tensor:
        if self.group.positions is not None:
            return self.group.positions
        length = self.writer.current.shape[1]
        return torch.arange(length, device=self.group.rows.device).expand(len(self.group.rows), -1)


BOUND = 64  # states that may wait in a layer: a prompt's is one, then one for each token


class Fill:
    """K/V of a skipped layer come from the hidden state that passed it, as late as can be."""

    name = "fill"

    def idle(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens: the states wait until somebody does, or until too many wait.

        A prompt's states wait where that takes no more memory than their keys and values.
        """
        held = cache.layers[layer._index]
        pending = held.pending
        pending.append((hidden, embeddings))
        full = len(pending) >= BOUND or held.is_sliding  # a window forgets; nothing may be late
        if not full and current.shape[1] == 1:  # a step of decoding comes here for each layer it skips
            return
        chunk = len(pending) > 1 and hidden.shape[1] > 1  # only a prompt waits whole
        if full or chunk or not current.can_defer(layer._index):
            self.flush(layer, cache)

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Compute what is pending, in one product for all waiting positions."""
        held = cache.layers[layer._index]
        if not held.pending:
            return
        pending, held.pending = held.pending, []
        states, embeddings = zip(*pending, strict=True)
        hidden = torch.cat(states, 1) if len(states) > 1 else states[0]
        written = layer._write_kv(layer, hidden, _joined(embeddings, hidden.shape[0]))
        held.update(*written)

    def writer(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, kwargs: dict) -> RectangularKVWriter:
        """Some run the layer."""
        if kwargs.get("cache") is not None:
            self.flush(layer, kwargs["cache"])
        return RectangularKVWriter(layer, current, hidden, kwargs, layer._write_kv)


class Zero:
    """Zeros in the cache, unmasked, so that they take their share of the softmax: the paper's way (2606.09514)."""

    name = "zero"

    def idle(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens."""
        cache.update(*self._zeros(layer, hidden, embeddings), layer._index)

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Nothing waits."""

    def writer(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, kwargs: dict) -> RectangularKVWriter:
        """Some run the layer."""
        return RectangularKVWriter(layer, current, hidden, kwargs, self._zeros)

    @staticmethod
    def _zeros(layer: nn.Module, hidden: Tensor, _: Any) -> KV:
        heads, size = layer._kv_shape
        zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], size)
        return zeros, zeros


class Hole:
    """A token is absent from the cache of a layer that it skipped, and masked where other rows ran."""

    name = "hole"

    def idle(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens: the positions go by."""
        cache.layers[layer._index].pass_by(hidden.shape[1])

    def flush(self, layer: nn.Module, cache: Any) -> None:
        """Nothing waits."""

    def writer(self, layer: nn.Module, current: RoutedForward, hidden: Tensor, kwargs: dict) -> RaggedKVWriter:
        """Some run the layer."""
        return RaggedKVWriter(layer, current, hidden, kwargs)


Policy = Fill | Hole | Zero
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Fill(), Hole(), Zero())}


def policy_named(name: str) -> Policy:
    """The policy of that name; BuddyError names the accepted ones."""
    if name not in POLICIES:
        raise BuddyError(f"There is no cache policy {name!r}; choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]


def _joined(embeddings: Sequence[Any], batch: int) -> Any:
    """Position embeddings of consecutive steps as one; where some hold for all rows, for the rows of the others."""
    if len(embeddings) == 1 or not isinstance(embeddings[0], tuple):
        return embeddings[0]
    rows = 1 if batch == 1 else max(part.shape[0] for part, *_ in embeddings)
    joined = []
    for parts in zip(*embeddings, strict=True):
        joined.append(torch.cat([part.expand(rows, -1, -1) for part in parts] if rows > 1 else parts, 1))
    return tuple(joined)
