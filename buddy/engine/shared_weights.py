"""Stock models that share the weights of a model: cut to some of its layers, without its layers, or its head alone.

Each of them runs the model's own code, so nothing here depends on the family. Routing hooks of the model are left out.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

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
    return _with_layers(model, [_renumbered(model.model.layers[old], new) for new, old in enumerate(kept)], config)


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states (B, T, D) after the last norm; some families do more than one product."""
    copied = _sharing_copy(model)
    copied._modules["model"] = _Decoded(states)
    return copied(input_ids=states.new_zeros(states.shape[:2], dtype=torch.long), use_cache=False).logits


class EmbeddingAndHead:
    """What comes before a model's layers and what comes after them.

    Its layers are stand-ins that note how each layer is called.

    Args:
        model: the whole model, routed or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = [_StandIn() for _ in model.model.layers]
        self._around = _with_layers(model, self._layers, model.config)

    def embed(self, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The hidden state (B, T, D) that enters the first layer, and each layer's keyword arguments.

        Args:
            input_ids: (B, T) long, without padding.
        """
        self._around.model(input_ids, use_cache=False)
        inputs = [layer.inputs for layer in self._layers]
        hidden = self._layers[0].hidden
        for layer in self._layers:
            layer.hidden = layer.inputs = None
        return hidden, inputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, D) as they leave the last layer."""
        return head_logits(self._model, self._model.model.norm(hidden[None]))[0]


class _StandIn(nn.Module):
    """In place of a decoder layer: notes its call and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Any = None
        self.inputs: Any = None

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        self.hidden, self.inputs = hidden_states, inputs
        return hidden_states


class _Decoded(nn.Module):
    """In place of the decoder: returns the hidden states that it was given."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


def _with_layers(model: PreTrainedModel, layers: Iterable[nn.Module], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in evaluation mode that shares all modules of `model` but its layers."""
    copied, base = _sharing_copy(model), _sharing_copy(model.model)
    base._modules["layers"], copied._modules["model"] = nn.ModuleList(layers), base
    copied.config = base.config = config
    return copied.eval()


def _sharing_copy(module: PreTrainedModel) -> PreTrainedModel:
    """The same parameters and submodules in a module of its own, without hooks."""
    copied = object.__new__(type(module))  # `copy.copy` would call the constructor of a module that FSDP shards
    copied.__dict__.update(module.__dict__, _modules=dict(module._modules))
    copied._forward_hooks, copied._forward_pre_hooks = OrderedDict(), OrderedDict()
    return copied


def _renumbered(layer: nn.Module, index: int) -> nn.Module:
    """A stock copy of a layer that shares its weights and writes to the cache at `index`."""
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    configs = {id(module.config): module.config for module in layer.modules() if hasattr(module, "config")}
    routed = layer.__class__
    layer.__class__ = stock_class(layer)  # a routed layer's copy must not look for a forward
    try:
        copied = copy.deepcopy(layer, shared | configs)
    finally:
        layer.__class__ = routed
    copied.self_attn.layer_idx = index
    return copied
