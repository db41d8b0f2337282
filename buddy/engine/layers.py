"""Decoder layers that can be skipped, per row and per token.

`attach` swaps the class of each decoder layer for a subclass, so module names, `isinstance`, `save_pretrained` and
deepcopy keep working and no modelling code is copied; `detach` gives the stock classes back. A routed layer asks the
current `RoutedForward` which tokens run; without one it is the stock layer.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from buddy.backbone.load import Backbone
from buddy.engine.forward import RoutedForward
from buddy.engine.kv_cache import Embeddings, WrittenKV
from buddy.engine.kv_policies import KV, WriteKV
from buddy.engine.layerwise import LayerwiseForward
from buddy.engine.selection import groups, map_tensors, take, worth_selecting
from buddy.errors import BackboneError

CurrentForward = list[RoutedForward | LayerwiseForward | None]  # one entry, shared by all layers of a routed model


class RoutedLayer:
    """Mixed in before a stock decoder layer: the same call, on the tokens whose plan runs it."""

    stock: type[nn.Module]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call `forward` without torch's module call where no hook needs it: that costs time in each decode step."""
        forward = self._current_forward[0]
        if forward is not None and forward.sink is not None and len(forward.sink.layers) == self._index:
            forward.sink.run(self, hidden_states, kwargs)
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if forward is None or hooks or self.training:
            return super().__call__(hidden_states, *args, **kwargs)
        return self.forward(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._current_forward[0]
        if forward is None:
            return super().forward(hidden_states, *args, **kwargs)
        rows = forward.active_rows[self._index]
        if rows is True:
            return self._run_all(forward, hidden_states, args, kwargs)
        if rows is False:
            return self._run_none(forward, hidden_states, kwargs)
        if rows is None:
            return self._run_planned(forward, hidden_states, args, kwargs)
        if kwargs.get("cache") is not None and forward.policy.name != "hole" and forward.only_sinks(rows):
            return self._run_sinks(forward, hidden_states, args, kwargs, rows[0])
        if forward.policy.name == "fill" and (forward.shape[1] == 1 or not worth_selecting(rows, prod(forward.shape))):
            return self._run_and_choose(forward, hidden_states, args, kwargs)
        return self._run_some(forward, hidden_states, args, kwargs, rows)

    def _run_planned(self, forward: Any, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer; a layer whose gate is asked now; or one that is computed for all tokens."""
        if self._index < forward.context_layer:
            return self._run_context_layer(forward, hidden, args, kwargs)
        if forward.undecided:
            if forward.request.gate_weighted:
                return self._run_weighted(forward, hidden, args, kwargs)
            forward.decide(self._index, hidden)
            return self.forward(hidden, *args, **kwargs)
        return self._run_and_choose(forward, hidden, args, kwargs)

    def _run_all(self, forward: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens run: the stock layer."""
        cache, policy = kwargs.get("cache"), forward.policy
        if cache is not None:
            if policy.name == "hole" and not cache.layers[self._index].complete:  # the stock mask knows no holes
                return self._run_some(forward, hidden, args, kwargs, [forward.shape[1]] * forward.shape[0])
            if cache.layers[self._index].pending:
                policy.flush(self, cache)
        forward.full_layers += 1
        return self.stock.forward(self, hidden, *args, **kwargs)

    def _run_none(self, forward: RoutedForward, hidden: Tensor, kwargs: dict) -> Tensor:
        """No token runs: the policy sees to the cache."""
        cache = kwargs.get("cache")
        if cache is not None:
            forward.policy.skip(self, forward, hidden, cache, kwargs.get("position_embeddings"))
        return forward.skip(self._index, hidden)

    def _run_sinks(self, forward: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict, count: int) -> Tensor:
        """Only the first `count` tokens run, and they see no others; K/V of the others can wait."""
        cache, policy, length = kwargs["cache"], forward.policy, hidden.shape[1]
        policy.flush(self, cache)
        hooks = self._forward_hooks or self._forward_pre_hooks  # they may hold what enters or leaves
        in_place = not (hooks or torch.is_grad_enabled() or forward.bridges is not None)
        if in_place and forward.writable is not hidden:  # a hook may hold what an earlier layer gave
            hidden = forward.writable = hidden.clone()
        mask, embeddings, ids = (kwargs.get(key) for key in ("attention_mask", "position_embeddings", "position_ids"))
        inputs = {
            **kwargs,
            "attention_mask": None if mask is None else mask[:, :, :count, : mask.shape[-1] - length + count],
            "position_embeddings": map_tensors(embeddings, lambda x: x[:, :count]),
            "position_ids": map_tensors(ids, lambda x: x[:, :count]),
        }
        if forward.sink is None:
            out = self.stock.forward(self, hidden[:, :count], *args, **inputs)
        else:
            out, keys, values = forward.sink.layers[self._index]
            cache.update(*(x.expand(len(hidden), -1, -1, -1) for x in (keys, values)), self._index)
            out = out.expand(len(hidden), -1, -1)
        ran = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        ran[:, :count] = True
        forward.partial_layers.append(ran)
        rest = map_tensors(embeddings, lambda x: x[:, count:])
        policy.skip(self, forward, hidden[:, count:], cache, rest)
        if not in_place:
            return torch.cat([out, forward.skip(self._index, hidden[:, count:])], 1)
        hidden[:, :count] = out  # so that a run of skipped layers shares one pending state
        return hidden

    def _run_context_layer(self, forward: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Run for all tokens, then plan from the keys and values that it wrote."""
        kwargs["cache"] = written = WrittenKV(kwargs.get("cache"))
        out = super().forward(hidden, *args, **kwargs)
        forward.full_layers += 1
        forward.make_plan(out, written.keys, written.values)
        return out

    def _run_and_choose(self, forward: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens are computed and chosen afterwards; gates leave the output as it is and receive gradients.

        In a decode step the weights are read for any row, which takes most of the time; selecting rows and their cache
        takes more than it saves. So does selecting tokens of a prompt where most of them run. The keys and values that
        a token that skips gets in this way are those that `fill` gives it.
        """
        cache, runs = kwargs.get("cache"), forward.chosen(self._index)
        if cache is not None:
            forward.policy.flush(self, cache)
        out = self.stock.forward(self, hidden, *args, **kwargs)
        forward.partial_layers.append(runs)
        skipped = forward.skip(self._index, hidden)
        chosen = torch.where(runs[..., None], out, skipped)
        gates = forward.request.gates
        if gates is None:
            # `where` may choose other strides, with which a product copies the weights.
            return chosen.view(hidden.shape)
        gate = gates[..., self._index, None]
        return chosen + (gate - gate.detach()).to(out.dtype) * (out - skipped)

    def _run_weighted(self, forward: LayerwiseForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens are computed; the weight of the gate mixes the layer's output with the state of a skip."""
        weight = forward.weigh(self._index, hidden)
        out = super().forward(hidden, *args, **kwargs)
        forward.full_layers += 1
        skipped = forward.skip(self._index, hidden)
        return skipped + weight[..., None].to(out.dtype) * (out - skipped)

    def _run_some(self, forward: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict, counts: list[int]) -> Tensor:
        """Run the chosen tokens of the chosen rows; the policy sees to the others."""
        ran = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        writer: Any = forward.policy.writer(self, forward, hidden, kwargs)
        out = forward.skip(self._index, hidden)
        for group in groups(forward.chosen(self._index), counts):
            writer.group = group
            out = self._run_group(writer, out, ran, hidden, args, kwargs)
        writer.finish()
        forward.partial_layers.append(ran)
        return out

    def _run_group(self, writer: Any, out: Tensor, ran: Tensor, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """One call of the stock layer: `out` (B, T, D) with its result; its tokens are marked in `ran` (B, T)."""
        (batch, length, width), group = hidden.shape, writer.group
        rows, positions = group.rows, group.positions

        def chosen(name: str) -> Any:
            return map_tensors(kwargs.get(name), lambda x: take(x, rows, positions, batch))

        inputs = {name: chosen(name) for name in ("position_ids", "position_embeddings")}
        inputs |= {"cache": writer, "attention_mask": writer.mask(kwargs.get("attention_mask"))}
        result = self.stock.forward(self, take(hidden, rows, positions, batch), *args, **{**kwargs, **inputs})
        if positions is None:
            ran[rows] = True
            return out.index_copy(0, rows, result)
        flat = group.flat(length, rows)
        ran.view(-1)[flat] = True
        return out.reshape(-1, width).index_copy(0, flat, result.reshape(-1, width)[group.real]).view(hidden.shape)


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The transformers class of a decoder layer, whether or not routing is attached to it."""
    return getattr(type(layer), "stock", type(layer))


@cache
def _routed_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The routed subclass of a stock decoder layer class."""
    return type(f"Routed{stock.__name__}", (RoutedLayer, stock), {"stock": stock, "__module__": __name__})


def attach(backbone: Backbone, current: CurrentForward) -> None:
    """Make the decoder layers of a backbone skippable.

    Args:
        backbone: its layers may be stock or attached before.
        current: where the layers find the forward pass that is running.

    Raises:
        BackboneError: a layer writes no keys and values.
    """
    layers, probes = backbone.layers, _probes(backbone)
    ways = []
    for layer, probe in zip(layers, probes, strict=True):
        if backbone.sharded:  # FSDP2 gathers a layer's weights by itself only when the layer is called
            layer.unshard()
        ways.append(_choose_projection(layer, *probe))
        if backbone.sharded:
            layer.reshard()
    for index, (layer, write) in enumerate(zip(layers, ways, strict=True)):
        layer.__class__ = _routed_class(stock_class(layer))  # type: ignore[arg-type]  # a class can be hashed
        layer._index, layer._write_kv, layer._current_forward = index, write, current


def detach(layers: nn.ModuleList) -> None:
    """Give the stock classes back."""
    for layer in layers:
        layer.__class__ = stock_class(layer)
        for name in ("_index", "_write_kv", "_current_forward"):
            layer.__dict__.pop(name, None)


def _projected_kv(layer: nn.Module, hidden: Tensor, embeddings: Embeddings) -> KV:
    """K and V, each (B, kv heads, T, size), that a layer would write for hidden states (B, T, D).

    By the layer's input norm and its attention's projections, the optional norm of the keys, and the usual rotary
    embedding. Decoding feels the cost of torch's module machinery, so modules are found where torch keeps them and are
    called past it where they have no hook.
    """
    attention = layer._modules["self_attn"]
    modules, settings = attention._modules, attention.__dict__
    states = _call(layer._modules["input_layernorm"], hidden)
    shape = (*states.shape[:-1], -1, settings["head_dim"])
    keys, norm = _call(modules["k_proj"], states).view(shape), modules.get("k_norm")
    keys = (keys if norm is None else norm(keys)).transpose(1, 2)
    values = _call(modules["v_proj"], states).view(shape).transpose(1, 2)
    if embeddings is not None and settings.get("use_rope", True):
        cos, sin = embeddings
        first, second = keys.chunk(2, -1)
        keys = keys * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    return keys, values


def _captured_kv(layer: nn.Module, hidden: Tensor, embeddings: Embeddings) -> KV:
    """`_projected_kv` by the family's real attention, stopped when it hands K and V to the cache.

    Works where projections are fused or ordered otherwise (Phi-3), at the price of the query projection.
    """
    stock = stock_class(layer)
    try:
        stock.forward(layer, hidden, position_embeddings=embeddings, attention_mask=None, cache=_StopAtUpdate())
    except _Reached as reached:
        return reached.keys, reached.values
    raise BackboneError(f"{stock.__name__} writes no keys and values to a cache, so it cannot be routed.")


def _choose_projection(layer: nn.Module, hidden: Tensor, embeddings: Embeddings) -> WriteKV:
    """`_projected_kv` where it equals the K and V of the real attention on a probe (B, T, D), else `_captured_kv`."""
    with torch.no_grad(), suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        truth = _captured_kv(layer, hidden, embeddings)
        if all(map(torch.equal, _projected_kv(layer, hidden, embeddings), truth)):
            return _projected_kv
    return _captured_kv


def _call(module: nn.Module, states: Tensor) -> Tensor:
    return module(states) if module._forward_hooks or module._forward_pre_hooks else module.forward(states)


class _Reached(Exception):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _StopAtUpdate:
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KV:
        raise _Reached(keys, values)


def _probes(backbone: Backbone) -> list[tuple[Tensor, Embeddings]]:
    """A random hidden state (1, 3, D) and its position embeddings for each layer, to compare ways of writing K/V."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, backbone.hidden_size, generator=generator).to(backbone.device, backbone.dtype)
    positions = torch.arange(3, device=backbone.device)[None]
    base, config = backbone.base, backbone.base.config
    kinds = getattr(config, "layer_types", None) or [None] * backbone.num_layers
    return [(hidden, _embed(base.rotary_emb, hidden, positions, kind)) for kind in kinds[: backbone.num_layers]]


def _embed(rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str | None) -> Embeddings:
    try:
        return rotary(hidden, positions)
    except (TypeError, AttributeError, KeyError):  # Gemma 3 keeps one table for each kind of attention
        return rotary(hidden, positions, kind)
