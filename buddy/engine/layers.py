"""Decoder layers that can be skipped, per row and per token.

`attach` swaps the class of each decoder layer for a subclass, so module names, `isinstance`, `save_pretrained` and
deepcopy keep working and no modelling code is copied; `detach` gives the stock classes back. A routed layer asks the
current `RoutedForward` which tokens run; without one it is the stock layer.

Weights of k_proj and v_proj side by side in memory, so that one product gives keys and values.

Of a few states such a product takes no longer than one of its halves. The modules keep their own parameters, which
become views of one storage: nothing is held twice, and whoever writes to them in place writes to both. Where a module
was replaced (by peft, say), hooked, or its weight moved elsewhere, there is no product of both.

Keys and values that a layer writes for tokens it does not run on (policy `fill`).

Three ways give the same result; `choose` compares them once when routing is attached, and takes the first that does:

- `Lean`: input norm, k_proj and v_proj, in one product where their weights lie side by side, the optional norm of the
  keys, the usual rotary embedding; on the short way past torch's module machinery. Equal to the last bit, or not taken.
- `projected`: the same with the family's own rotary embedding.
- `captured`: the family's real attention, stopped at the moment it hands K/V to the cache. Works where projections are
  fused or ordered otherwise (Phi-3), at the price of the query projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import Backbone
from buddy.engine.forward import RoutedForward
from buddy.engine.kv_cache import Capture, each
from buddy.engine.kv_policies import Policy, View
from buddy.engine.selection import Group, by_blocks, groups, take, taken
from buddy.errors import BackboneError


def adjoin(attention: nn.Module) -> None:
    """Lay both weights into one storage, where they are plain and alike; their values stay."""
    pair = _pair(attention)
    if pair is None or torch.is_inference_mode_enabled():
        return
    keys, values = pair
    if keys.device.type != "meta" and not _adjacent(keys, values):
        both = torch.cat([keys.detach(), values.detach()])
        keys.data, values.data = both[: len(keys)], both[len(keys) :]


def separate(attention: nn.Module) -> None:
    """Give each weight a storage of its own again."""
    pair = _pair(attention)
    if pair is not None and _adjacent(*pair):
        for weight in pair:
            weight.data = weight.detach().clone()


class Both:
    """Finds the weight of both, (keys + values, D), of one attention; looks anew when a module or a storage changed.

    Attributes:
        features: of keys and of values, once a weight was found.
    """

    features: tuple[int, int]

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._places: tuple[int, int] | None = None
        self._weight: Tensor | None = None

    def __call__(self, attention: nn.Module) -> Tensor | None:
        """None where the two are not side by side, or something is to be called or trained on the way."""
        modules = attention._modules
        one, other = modules.get("k_proj"), modules.get("v_proj")
        if type(one) is not nn.Linear or type(other) is not nn.Linear or _watched(one) or _watched(other):
            return None
        keys, values = one._parameters["weight"], other._parameters["weight"]
        if keys.requires_grad or values.requires_grad:
            return None
        places = keys.data_ptr(), values.data_ptr()
        if keys is not self._keys or values is not self._values or places != self._places:
            self._keys, self._values, self._places = keys, values, places
            self.features, self._weight = (len(keys), len(values)), _joint(attention)
        return self._weight


def _joint(attention: nn.Module) -> Tensor | None:
    pair = _pair(attention)
    if pair is None or not _adjacent(*pair):
        return None
    keys, values = pair
    return keys.detach().as_strided((len(keys) + len(values), keys.shape[1]), keys.stride())


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pair(attention: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Both weights; None where a module is none of torch's own or has a bias, or they are not alike and frozen."""
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if any(type(module) is not nn.Linear or module.bias is not None for module in found):
        return None
    keys, values = (module.weight for module in found)
    if type(keys) is not nn.Parameter or type(values) is not nn.Parameter or keys.requires_grad or values.requires_grad:
        return None
    alike = (keys.dtype, keys.device, keys.shape[1]) == (values.dtype, values.device, values.shape[1])
    return (keys, values) if alike else None


def _adjacent(keys: Tensor, values: Tensor) -> bool:
    """Whether the second begins where the first ends."""
    return (
        keys.is_contiguous()
        and values.is_contiguous()
        and keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        and keys.data_ptr() + keys.nbytes == values.data_ptr()
    )


KeyValue = tuple[Tensor, Tensor]
WriteKV = Callable[[nn.Module, Tensor, Any], KeyValue]


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The transformers class of a decoder layer, whether or not routing is attached to it."""
    return getattr(type(layer), "stock", type(layer))


class Lean:
    """K and V, each (B, kv heads, T, head size), of hidden states (B, T, D), by few small operations; for one layer.

    Its parts are looked up where torch keeps them: a step of decoding feels what `getattr` of a module takes.
    """

    def __init__(self) -> None:
        self._both = Both()

    def __call__(self, layer: nn.Module, hidden: Tensor, position_embeddings: Any) -> KeyValue:
        attention = layer._modules["self_attn"]
        weight = self._both(attention)
        keys, values = _apart(layer, hidden) if weight is None else self._together(layer, attention, weight, hidden)
        if position_embeddings is not None and attention.__dict__.get("use_rope", True):
            cos, sin = position_embeddings
            first, second = keys.chunk(2, -1)
            keys = keys * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
        return keys, values

    def _together(self, layer: nn.Module, attention: nn.Module, weight: Tensor, hidden: Tensor) -> KeyValue:
        states = _called(layer._modules["input_layernorm"], hidden)
        size = attention.__dict__["head_dim"]
        both = F.linear(states, weight).view(*states.shape[:-1], -1, size)
        keys, values = both.split_with_sizes([features // size for features in self._both.features], 2)
        norm = attention._modules.get("k_norm")
        keys = keys if norm is None else norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)


def projected(layer: nn.Module, hidden: Tensor, position_embeddings: Any) -> KeyValue:
    """The same, by the attention's own projections and the family's own rotary embedding."""
    keys, values = _apart(layer, hidden)
    attention = layer.self_attn
    if position_embeddings is not None and getattr(attention, "use_rope", True):
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        _, keys = rotate(keys[:, :0], keys, *position_embeddings)  # without a query
    return keys, values


def _apart(layer: nn.Module, hidden: Tensor) -> KeyValue:
    """Keys without their rotation, and values, by the attention's own projections."""
    attention = layer.self_attn
    states = _called(layer.input_layernorm, hidden)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    keys = _called(attention.k_proj, states).view(shape)
    if getattr(attention, "k_norm", None) is not None:
        keys = attention.k_norm(keys)
    return keys.transpose(1, 2), _called(attention.v_proj, states).view(shape).transpose(1, 2)


def _called(module: nn.Module, states: Tensor) -> Tensor:
    """The module's output, past torch's module machinery where no hook is to be called."""
    if module._forward_hooks or module._forward_pre_hooks:
        return module(states)
    return module.forward(states)


def captured(layer: nn.Module, hidden: Tensor, position_embeddings: Any) -> KeyValue:
    """The same, by the real attention up to its `cache.update`."""
    try:
        stock_class(layer).forward(
            layer, hidden, position_embeddings=position_embeddings, attention_mask=None, cache=_StopAtUpdate()
        )
    except _Reached as reached:
        return reached.keys, reached.values
    raise BackboneError(f"{stock_class(layer).__name__} writes no keys and values to a cache, so it cannot be routed.")


def choose(layer: nn.Module, hidden: Tensor, position_embeddings: Any) -> WriteKV:
    """The quickest way that reproduces what the real attention writes on a probe (B, T, D)."""
    with torch.no_grad():
        truth = captured(layer, hidden, position_embeddings)
        for way, near in ((Lean(), torch.equal), (projected, _near)):
            with suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
                if all(map(near, way(layer, hidden, position_embeddings), truth)):
                    return way
    return captured


def _near(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-5)


def shared_out(layer: nn.Module) -> bool:
    """Whether devices share the layer's weights out (FSDP2)."""
    return hasattr(layer, "unshard")


@contextmanager
def whole(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer with all its weights within this block, where devices share them out (FSDP2): past its own call."""
    if not shared_out(layer):
        yield layer
        return
    layer.unshard()
    try:
        yield layer
    finally:
        layer.reshard()


class _Reached(Exception):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _StopAtUpdate:
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeyValue:
        raise _Reached(keys, values)


def probes(backbone: Backbone) -> list[tuple[Tensor, Any]]:
    """A random hidden state and its position embeddings for each layer, to compare ways of writing K/V."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, backbone.hidden_size, generator=generator).to(backbone.device, backbone.dtype)
    positions = torch.arange(3, device=backbone.device)[None]
    base, config = backbone.base, backbone.base.config
    kinds = getattr(config, "layer_types", None) or [None] * backbone.num_layers
    return [(hidden, _embeddings(base.rotary_emb, hidden, positions, kind)) for kind in kinds[: backbone.num_layers]]


def _embeddings(rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str | None) -> Any:
    try:
        return rotary(hidden, positions)
    except (TypeError, AttributeError, KeyError):  # Gemma 3 keeps one table a kind of attention
        return rotary(hidden, positions, kind)


class Seat:
    """Where the layers find the pass that is under way, and the cache policy. One per routed model."""

    def __init__(self, policy: Policy) -> None:
        self.current: RoutedForward | None = None
        self.policy = policy


class RoutedLayer:
    """Mixed in before a stock decoder layer: the same call, on the tokens whose plan runs it."""

    stock: type[nn.Module]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Where everybody or nobody runs the layer, the short way, past torch's module machinery."""
        current = self._seat[0].current
        if current is not None and not (self._forward_hooks or self._forward_pre_hooks or self.training):
            who = current.active_rows[self._index]
            if who is True:
                return self._whole(current, hidden_states, args, kwargs)
            if who is False:
                return self._nobody(current, hidden_states, kwargs)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = self._seat[0].current
        if current is None:
            return super().forward(hidden_states, *args, **kwargs)
        who = current.active_rows[self._index]
        if who is True:
            return self._whole(current, hidden_states, args, kwargs)
        if who is False:
            return self._nobody(current, hidden_states, kwargs)
        if who is None:
            return self._own_way(current, hidden_states, args, kwargs)
        if kwargs.get("cache") is not None and self._seat[0].policy.name != "hole" and current.only_sinks(who):
            return self._sinks(current, hidden_states, args, kwargs, who[0])
        return self._some(current, hidden_states, args, kwargs, who)

    def _own_way(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer; one that decides now, which is then like any other; or one computed for all."""
        if self._index < current.context_layer:
            return self._with_context(current, hidden, args, kwargs)
        if current.undecided:
            if current.request.gate_weighted:
                return self._weighted(current, hidden, args, kwargs)
            current.decide(self._index, hidden)
            if not current.compute_all_layers:
                return self.forward(hidden, *args, **kwargs)
        return self._everything(current, hidden, args, kwargs)

    def _whole(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens run: the stock layer."""
        cache, policy = kwargs.get("cache"), self._seat[0].policy
        if cache is not None:
            if policy.name == "hole" and not cache.layers[self._index].whole:  # the stock mask knows no holes
                return self._some(current, hidden, args, kwargs, [current.shape[1]] * current.shape[0])
            if cache.layers[self._index].pending:
                policy.flush(self, cache)
        current.whole += 1
        return self.stock.forward(self, hidden, *args, **kwargs)

    def _nobody(self, current: RoutedForward, hidden: Tensor, kwargs: dict) -> Tensor:
        """No token runs: the policy sees to the cache."""
        cache = kwargs.get("cache")
        if cache is not None:
            self._seat[0].policy.idle(self, current, hidden, cache, kwargs.get("position_embeddings"))
        return hidden

    def _sinks(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict, count: int) -> Tensor:
        """Only the first `count` tokens run, and need nobody's keys but their own; the others' are not urgent."""
        cache, policy = kwargs["cache"], self._seat[0].policy
        policy.flush(self, cache)
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

    def _remembered_sinks(self, current: RoutedForward, cache: Any, count: int) -> Tensor | None:
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

    def _with_context(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """The context layer: run for all, then plan from what it wrote."""
        capture = Capture(kwargs.get("cache"))
        kwargs["cache"] = capture
        out = super().forward(hidden, *args, **kwargs)
        current.whole += 1
        current.make_plan(out, capture.keys, capture.values)
        return out

    def _everything(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
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

    def _weighted(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """All tokens computed, and what the layer adds to them multiplied by the weights of its gate."""
        weight = current.weigh(self._index, hidden)
        out = super().forward(hidden, *args, **kwargs)
        current.whole += 1
        return hidden + weight[..., None].to(out.dtype) * (out - hidden)

    def _some(self, current: RoutedForward, hidden: Tensor, args: tuple, kwargs: dict, counts: list[int]) -> Tensor:
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
