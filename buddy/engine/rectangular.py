"""K/V of one layer in one forward, stored for all positions of all rows (policies `fill` and `zero`)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from buddy.engine.attention import Blocks, blocks_of
from buddy.engine.forward import Pass
from buddy.engine.select import Group, take, taken

KV = tuple[Tensor, Tensor]


class View(Protocol):
    """The cache as a layer sees it in the call for one group of rows."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> KV:
        """Take what the call wrote, give all that it may read."""

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask of the call's queries for what `update` gives, from the layer's own (B or 1, 1, T, S)."""

    def blocks(self, mask: Tensor | None) -> Blocks | None:
        """How the attention of the call may be cut, given that mask."""


class Rectangular:
    """Puts together the K/V that one layer writes in one forward: all positions of all rows.

    Args:
        layer: a routed layer.
        current: the pass.
        hidden: (B, T, D) as it enters the layer.
        kwargs: of the layer's forward.
        write: makes K and V of (G, n, D) hidden states that skip the layer, with their position embeddings.
    """

    def __init__(self, layer: nn.Module, current: Pass, hidden: Tensor, kwargs: dict, write: Any) -> None:
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

    def __init__(self, current: Pass, group: Group, rest: KV | None, past: KV | None) -> None:
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
