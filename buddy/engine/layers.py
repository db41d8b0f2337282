"""Decoder layers that can be skipped, per row and per token.

`attach` swaps the class of each decoder layer for a subclass, so module names, `isinstance`, `save_pretrained` and
deepcopy keep working and no modelling code is copied; `detach` gives the stock classes back. A routed layer asks the
current `Pass` which tokens run; without one it is the stock layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from buddy.engine.adjoined import adjoin, separate
from buddy.engine.attention import by_blocks
from buddy.engine.cache import Capture
from buddy.engine.cachelayers import each
from buddy.engine.forward import Pass
from buddy.engine.kv import captured, choose, shared_out, stock_class, whole
from buddy.engine.policies import Policy
from buddy.engine.rectangular import View
from buddy.engine.select import Group, groups, take, taken


class Seat:
    """Where the layers find the pass that is under way, and the cache policy. One per routed model."""

    def __init__(self, policy: Policy) -> None:
        self.current: Pass | None = None
        self.policy = policy


class RoutedLayer:
    """Mixed in before a stock decoder layer: the same call, on the tokens whose plan runs it."""

    stock: type[nn.Module]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Where everybody or nobody runs the layer, the short way, past torch's module machinery."""
        current = self._seat[0].current
        if current is not None and not (self._forward_hooks or self._forward_pre_hooks or self.training):
            who = current.who[self._index]
            if who is True:
                return self._whole(current, hidden_states, args, kwargs)
            if who is False:
                return self._nobody(current, hidden_states, kwargs)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = self._seat[0].current
        if current is None:
            return super().forward(hidden_states, *args, **kwargs)
        who = current.who[self._index]
        if who is True:
            return self._whole(current, hidden_states, args, kwargs)
        if who is False:
            return self._nobody(current, hidden_states, kwargs)
        if who is None:
            return self._own_way(current, hidden_states, args, kwargs)
        if kwargs.get("cache") is not None and self._seat[0].policy.name != "hole" and current.only_sinks(who):
            return self._sinks(current, hidden_states, args, kwargs, who[0])
        return self._some(current, hidden_states, args, kwargs, who)

    def _own_way(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer; one that decides now, which is then like any other; or one computed for all."""
        if self._index < current.context_layer:
            return self._with_context(current, hidden, args, kwargs)
        if current.undecided:
            if current.request.weighted:
                return self._weighted(current, hidden, args, kwargs)
            current.decide(self._index, hidden)
            if not current.everything:
                return self.forward(hidden, *args, **kwargs)
        return self._everything(current, hidden, args, kwargs)

    def _whole(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens run: the stock layer."""
        cache, policy = kwargs.get("cache"), self._seat[0].policy
        if cache is not None:
            if policy.name == "hole" and not cache.layers[self._index].whole:  # the stock mask knows no holes
                return self._some(current, hidden, args, kwargs, [current.shape[1]] * current.shape[0])
            if cache.layers[self._index].owed:
                policy.settle(self, cache)
        current.whole += 1
        return self.stock.forward(self, hidden, *args, **kwargs)

    def _nobody(self, current: Pass, hidden: Tensor, kwargs: dict) -> Tensor:
        """No token runs: the policy sees to the cache."""
        cache = kwargs.get("cache")
        if cache is not None:
            self._seat[0].policy.idle(self, current, hidden, cache, kwargs.get("position_embeddings"))
        return hidden

    def _sinks(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict, count: int) -> Tensor:
        """Only the first `count` tokens run, and need nobody's keys but their own; the others' are not urgent."""
        cache, policy = kwargs["cache"], self._seat[0].policy
        policy.settle(self, cache)
        out = self._remembered_sinks(current, cache, count)
        if out is None:
            out = self._run_sinks(hidden, args, kwargs, count)
        ran = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        ran[:, :count] = True
        current.parts.append(ran)
        late = each(kwargs.get("position_embeddings"), lambda x: x[:, count:])
        policy.idle(self, current, hidden[:, count:], cache, late)
        if self._forward_hooks or torch.is_grad_enabled():
            return torch.cat([out, hidden[:, count:]], 1)
        hidden[:, :count] = out  # in place, so that a run of skipped layers shares one waiting state
        return hidden

    def _remembered_sinks(self, current: Pass, cache: Any, count: int) -> Tensor | None:
        """The sinks' states (B, count, D) as they leave this layer, where they are known for these token ids."""
        if self._forward_hooks or self._forward_pre_hooks or torch.is_grad_enabled():
            return None
        states = current.sink_states(count)
        if states is not None:
            cache.update(states.keys[self._index], states.values[self._index], self._index)
        return None if states is None else states.hidden[self._index]

    def _run_sinks(self, hidden: Tensor, args: tuple, kwargs: dict, count: int) -> Tensor:
        """The stock layer on the first `count` tokens."""
        length = hidden.shape[1]
        mask, embeddings, ids = (kwargs.get(key) for key in ("attention_mask", "position_embeddings", "position_ids"))
        inputs = {
            **kwargs,
            "attention_mask": None if mask is None else mask[:, :, :count, : mask.shape[-1] - length + count],
            "position_embeddings": each(embeddings, lambda x: x[:, :count]),
            "position_ids": None if ids is None else ids[:, :count],
        }
        return self.stock.forward(self, hidden[:, :count], *args, **inputs)

    def _with_context(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer: run for all, then plan from what it wrote."""
        capture = Capture(kwargs.get("cache"))
        kwargs["cache"] = capture
        out = super().forward(hidden, *args, **kwargs)
        current.whole += 1
        current.make_plan(out, capture.keys, capture.values)
        return out

    def _everything(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens computed, chosen afterwards; with gates, exactly hard forward and their gradients backward."""
        runs = current.chosen(self._index)
        out = super().forward(hidden, *args, **kwargs)
        current.parts.append(runs)
        chosen = torch.where(runs[..., None], out, hidden)
        gates = current.request.gates
        if gates is None:
            return chosen
        gate = gates[..., self._index, None]
        return chosen + (gate - gate.detach()).to(out.dtype) * (out - hidden)

    def _weighted(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens computed, and what the layer adds to them multiplied by the weights of its gate."""
        weight = current.weigh(self._index, hidden)
        out = super().forward(hidden, *args, **kwargs)
        current.whole += 1
        return hidden + weight[..., None].to(out.dtype) * (out - hidden)

    def _some(self, current: Pass, hidden: Tensor, args: tuple, kwargs: dict, counts: list[int]) -> Tensor:
        """Run the chosen tokens of the chosen rows; the policy sees to the others."""
        ran = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        writer = self._seat[0].policy.writer(self, current, hidden, kwargs)
        out = hidden
        for group in groups(current.chosen(self._index), counts):
            view = writer.view(group)
            out = self._run(group, view, out, ran, hidden, args, kwargs)
            writer.put(view)
        writer.finish()
        current.parts.append(ran)
        return out

    def _run(
        self, group: Group, view: View, out: Tensor, ran: Tensor, hidden: Tensor, args: tuple, kwargs: dict
    ) -> Tensor:
        """One call of the stock layer; its result laid over `out` (B, T, D), and noted in `ran` (B, T)."""
        (batch, length, width), rows, positions = hidden.shape, group.rows, group.positions
        mask = view.mask(kwargs.get("attention_mask"))
        inputs = {
            **kwargs,
            "cache": view,
            "attention_mask": mask,
            "position_ids": taken(kwargs.get("position_ids"), rows, positions, batch),
            "position_embeddings": taken(kwargs.get("position_embeddings"), rows, positions, batch),
        }
        with by_blocks(self, view.blocks(mask)) as option:
            result = self.stock.forward(self, take(hidden, rows, positions, batch), *args, **inputs, **option)
        if positions is None:
            ran[rows] = True
            return out.index_copy(0, rows, result)
        flat, real = group.flat(length, rows)
        ran.view(-1)[flat] = True
        result = result.reshape(-1, width)
        result = result if real is None else result[real]
        return out.reshape(-1, width).index_copy(0, flat, result).view(hidden.shape)


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
    adjoin_all(layers)
    ways = []
    for layer, probe in zip(layers, probes, strict=True):
        with whole(layer):
            ways.append(choose(layer, *probe))
    with whole(layers[0]) as first:
        keys, _ = captured(first, *probes[0])
    for index, (layer, write) in enumerate(zip(layers, ways, strict=True)):
        layer.__class__ = routed_class(stock_class(layer))
        layer._index, layer._write_kv = index, write
        layer._kv_shape = (keys.shape[1], keys.shape[3])
        layer._seat = (seat,)  # in a tuple, so that torch does not look into it


def adjoin_all(layers: nn.ModuleList) -> None:
    """Lay the weights of keys and values side by side, where no devices share them out."""
    for layer in layers:
        if not shared_out(layer):
            adjoin(layer.self_attn)


def detach(layers: nn.ModuleList) -> None:
    """Give the stock classes back."""
    for layer in layers:
        layer.__class__ = stock_class(layer)
        if not shared_out(layer):
            separate(layer.self_attn)
        for name in ("_index", "_write_kv", "_kv_shape", "_seat"):
            layer.__dict__.pop(name, None)
