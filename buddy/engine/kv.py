"""Keys and values that a layer writes for tokens it does not run on (policy `fill`).

Two ways give the same result; `choose` compares them once when routing is attached:

- `projected`: input norm, k_proj and v_proj, the optional norm of the keys, the family's own rotary embedding.
- `captured`: the family's real attention, stopped at the moment it hands K/V to the cache. Works where projections are
  fused or ordered otherwise (Phi-3), at the price of the query projection.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from buddy.backbone import Backbone
from buddy.errors import BackboneError

KeyValue = tuple[Tensor, Tensor]
WriteKV = Callable[[nn.Module, Tensor, Any], KeyValue]


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The transformers class of a decoder layer, whether or not routing is attached to it."""
    return getattr(type(layer), "stock", type(layer))


def projected(layer: nn.Module, hidden: Tensor, position_embeddings: Any) -> KeyValue:
    """K and V, each (B, kv heads, T, head size), of hidden states (B, T, D) by the attention's own projections."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(states).view(shape)
    if getattr(attention, "k_norm", None) is not None:
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), attention.v_proj(states).view(shape).transpose(1, 2)
    if position_embeddings is not None and getattr(attention, "use_rope", True):
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        _, keys = rotate(keys[:, :0], keys, *position_embeddings)  # without a query
    return keys, values


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
    """`projected` where it reproduces what the real attention writes on a probe (B, T, D), else `captured`."""
    with torch.no_grad():
        truth = captured(layer, hidden, position_embeddings)
        try:
            ours = projected(layer, hidden, position_embeddings)
        except (AttributeError, TypeError, RuntimeError):
            return captured
    same = all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in zip(ours, truth, strict=True)
    )
    return projected if same else captured


@contextmanager
def whole(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer with all its weights within this block, where devices share them out (FSDP2): past its own call."""
    if not hasattr(layer, "unshard"):
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
