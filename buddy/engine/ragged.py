"""K/V of one layer in one forward, stored only for positions that some row ran (policy `hole`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from buddy.engine.forward import Pass
from buddy.engine.rectangular import KV
from buddy.engine.select import Group, take


class Ragged:
    """Puts together the K/V of one layer under `hole`: the positions that any row ran, marked for those that did."""

    def __init__(self, layer: nn.Module, current: Pass, hidden: Tensor, kwargs: dict) -> None:
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

    def __init__(self, writer: Ragged, group: Group) -> None:
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
