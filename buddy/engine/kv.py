"""Keys and values that a layer writes for tokens it does not run on (policy `fill`).

Three ways give the same result; `choose` compares them once when routing is attached, and takes the first that does:

- `Lean`: input norm, k_proj and v_proj, in one product where their weights lie side by side, the optional norm of the
  keys, the usual rotary embedding; on the short way past torch's module machinery. Equal to the last bit, or not taken.
- `projected`: the same with the family's own rotary embedding.
- `captured`: the family's real attention, stopped at the moment it hands K/V to the cache. Works where projections are
  fused or ordered otherwise (Phi-3), at the price of the query projection.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import Backbone
from buddy.engine.layers import Both
from buddy.errors import BackboneError

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
