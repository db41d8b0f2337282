"""A stock model physically cut to some of its layers: what a plan of so many layers should cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from buddy.engine.layers import stock_class

PER_LAYER = ("layer_types", "no_rope_layers")  # what a configuration says of each layer


def pruned_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A stock model of the kept layers, in their order; it shares the weights of `model` and copies none.

    Args:
        model: the whole model, routed or not.
        kept: layer indices, rising.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[index] for index in kept])
    with torch.device("meta"):
        small = type(model)(config)
    small.model.layers = nn.ModuleList(_renumbered(model.model.layers[old], new) for new, old in enumerate(kept))
    for name, part in model.model.named_children():
        if name != "layers":
            setattr(small.model, name, part)
    small.lm_head = model.lm_head
    small.config._attn_implementation = model.config._attn_implementation
    return small.eval()


def _renumbered(layer: nn.Module, index: int) -> nn.Module:
    """A stock copy of a layer that shares its weights and writes to the cache at `index`."""
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    plain = layer.__class__
    layer.__class__ = stock_class(layer)  # a routed layer's copy must not look for a pass
    try:
        twin = copy.deepcopy(layer, shared | {id(config): config for config in _configs(layer)})
    finally:
        layer.__class__ = plain
    twin.self_attn.layer_idx = index
    return twin


def _configs(layer: nn.Module) -> list[object]:
    return [module.config for module in layer.modules() if hasattr(module, "config")]
