"""Decoder layers that can be skipped, per row and per token.

`attach` swaps the class of each decoder layer for a subclass, so module names, `isinstance`, `save_pretrained` and
deepcopy keep working and no modelling code is copied; `detach` gives the stock classes back. A routed layer asks the
current `Pass` which tokens run; without one it is the stock layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from buddy.engine.cache import Capture, RowsAndTokens
from buddy.engine.forward import Pass
from buddy.engine.kv import choose, stock_class
from buddy.engine.select import Group, groups, take


class Seat:
    """Where the layers find the pass that is under way. One per routed model."""

    def __init__(self) -> None:
        self.current: Pass | None = None


class RoutedLayer:
    """Mixed in before a stock decoder layer: the same call, on the tokens whose plan runs it."""

    stock: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = self._seat[0].current
        if current is None:
            return super().forward(hidden_states, *args, **kwargs)
        if self._index == current.context_layer - 1:
            return self._with_context(current, hidden_states, args, kwargs)
        if current.everything and self._index >= current.context_layer:
            return self._everything(current, hidden_states, args, kwargs)
        counts = current.counts(self._index)
        if counts is None:
            current.record(self._index, None)
            return super().forward(hidden_states, *args, **kwargs)
        return self._some(current, hidden_states, args, kwargs, counts)

    def _with_context(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer: run for all, then plan from what it wrote."""
        capture = Capture(kwargs.get("cache"))
        out = super().forward(hidden, *args, **{**kwargs, "cache": capture})
        current.record(self._index, None)
        current.make_plan(out, capture.keys, capture.values)
        return out

    def _everything(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens computed, chosen afterwards; with gates, exactly hard forward and their gradients backward."""
        runs = current.runs[..., self._index]
        out = super().forward(hidden, *args, **kwargs)
        current.record(self._index, runs)
        chosen = torch.where(runs[..., None], out, hidden)
        if current.gates is None:
            return chosen
        gate = current.gates[..., self._index, None]
        return chosen + (gate - gate.detach()).to(out.dtype) * (out - hidden)

    def _some(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict, counts: list[int]) -> Tensor:
        """Run the chosen tokens of the chosen rows; write K/V for the others."""
        cache = kwargs.get("cache")
        chosen = current.runs[..., self._index]
        current.record(self._index, chosen)
        new = _NewKV(self, hidden, cache, kwargs.get("position_embeddings"))
        out = hidden
        for group in groups(chosen, counts):
            out = self._run_group(current, group, out, hidden, args, kwargs, new)
        if cache is not None:
            cache.update(*new.complete([n > 0 for n in counts]), self._index)
        return out

    def _run_group(
        self, current: Pass, group: Group, out: Tensor, hidden: Tensor, args: tuple, kwargs: dict, new: _NewKV
    ) -> Tensor:
        batch = hidden.shape[0]
        positions = None if group.order is None else group.order[:, : group.length]
        view = new.view(group)
        inputs = {
            **kwargs,
            "cache": view,
            "attention_mask": current.mask(kwargs.get("attention_mask"), group.rows, positions, self, hidden),
            "position_ids": _taken(kwargs.get("position_ids"), group.rows, positions, batch),
            "position_embeddings": _taken(kwargs.get("position_embeddings"), group.rows, positions, batch),
        }
        result = super().forward(take(hidden, group.rows, positions, batch), *args, **inputs)
        new.put(group, view)
        if positions is None:
            return out.index_copy(0, group.rows, result)
        flat = group.rows[:, None] * hidden.shape[1] + positions
        real = torch.arange(group.length, device=hidden.device) < group.counts[:, None]
        width = hidden.shape[-1]
        return out.reshape(-1, width).index_copy(0, flat[real], result[real]).view(hidden.shape)


class _NewKV:
    """Keys and values of the new positions of one layer, put together from the calls it makes."""

    def __init__(self, layer: nn.Module, hidden: Tensor, cache: Any | None, position_embeddings: Any) -> None:
        self.layer, self.hidden, self.cache, self.embeddings = layer, hidden, cache, position_embeddings
        self.new: tuple[Tensor, Tensor] | None = None

    def view(self, group: Group) -> RowsAndTokens:
        """The cache that the layer sees while it runs `group`."""
        rest = None
        if group.order is not None and group.length < group.order.shape[1]:
            rest = self._write(group.rows, group.order[:, group.length :])
        return RowsAndTokens(group, rest, self._past(group.rows))

    def put(self, group: Group, view: RowsAndTokens) -> None:
        """Keep what the rows of `group` wrote, if a cache will want it."""
        if self.cache is None or view.new is None:
            return
        batch = self.hidden.shape[0]
        if self.new is None:
            self.new = tuple(part.new_empty(batch, *part.shape[1:]) for part in view.new)
        for whole, part in zip(self.new, view.new, strict=True):
            whole[group.rows] = part

    def complete(self, ran: list[bool]) -> tuple[Tensor, Tensor]:
        """All rows' keys and values, each (B, heads, T, size), those of rows that did not run included."""
        idle = torch.tensor([row for row, on in enumerate(ran) if not on], device=self.hidden.device, dtype=torch.long)
        if self.new is None:
            return self.layer._write_kv(self.layer, self.hidden, self.embeddings)
        if len(idle):
            for whole, part in zip(self.new, self._write(idle, None), strict=True):
                whole[idle] = part
        return self.new

    def _write(self, rows: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = self.hidden.shape[0]
        embeddings = _taken(self.embeddings, rows, positions, batch)
        return self.layer._write_kv(self.layer, take(self.hidden, rows, positions, batch), embeddings)

    def _past(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        layer = self.layer._index
        if self.cache is None or self.cache.get_seq_length(layer) == 0:
            return None
        held = self.cache.layers[layer]
        return held.keys[rows], held.values[rows]


def _taken(value: Any, rows: Tensor, positions: Tensor | None, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_taken(part, rows, positions, batch) for part in value)
    return take(value, rows, positions, batch) if isinstance(value, Tensor) else value


_ROUTED: dict[type, type] = {}


def routed_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a stock decoder layer class."""
    if stock not in _ROUTED:
        _ROUTED[stock] = type(f"Routed{stock.__name__}", (RoutedLayer, stock), {"stock": stock, "__module__": __name__})
    return _ROUTED[stock]


def attach(layers: nn.ModuleList, seat: Seat, probes: list[tuple[Tensor, Any]]) -> None:
    """Make decoder layers skippable.

    Args:
        layers: the backbone's decoder layers, stock or attached before.
        seat: where they look for the current pass.
        probes: for each layer a hidden state (1, T, D) and its position embeddings, to choose how K/V are written.

    Raises:
        BackboneError: a layer writes no keys and values.
    """
    ways = [choose(layer, *probe) for layer, probe in zip(layers, probes, strict=True)]
    for index, (layer, write) in enumerate(zip(layers, ways, strict=True)):
        layer.__class__ = routed_class(stock_class(layer))
        layer._index, layer._write_kv = index, write
        layer._seat = (seat,)  # in a tuple, so that torch does not look into it


def detach(layers: nn.ModuleList) -> None:
    """Give the stock classes back."""
    for layer in layers:
        layer.__class__ = stock_class(layer)
        for name in ("_index", "_write_kv", "_seat"):
            layer.__dict__.pop(name, None)
